"""How far a teacher in 8 bits is from the exact one, at each timestep, before any update is based on it.

A few predictions with both, while the student still is the exact teacher. They are not part of the training, nor in the
run's count of evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastunlearn.config import TeacherConfig
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.errors import UserError
from fastunlearn.models.backbone import Predictor
from fastunlearn.prompts.variants import PromptTable

POINTS = 8
SAMPLES = 2


@dataclass(frozen=True)
class TargetError:
    """At one timestep: |stored - exact| of the prediction, and of what the concept adds to the anchor, relative."""

    timestep: int
    prediction: float
    concept: float


@torch.no_grad()
def target_errors(models: Predictors, prompt_table: PromptTable, seed: int) -> list[TargetError]:
    """Errors of the stored teacher at ``POINTS`` timesteps over the schedule, on noise, for a first prompt of each
    concept. Call it before the first update: the student's weights must still be the teacher's."""
    draw = torch.Generator().manual_seed(seed)
    backbone = models.backbone
    variants = [variants[0] for variants in prompt_table.variants]
    total = len(backbone.noise)
    found = []
    for i in range(POINTS):
        timestep = (2 * i + 1) * total // (2 * POINTS)
        latents = torch.randn(SAMPLES, *backbone.sample_shape, generator=draw).to(backbone.embeds.hidden.device)
        rows = [(prompt_table.index[variant.prompt], prompt_table.index[variant.anchor]) for variant in variants]
        errors = [_errors(models, latents, timestep, pair) for pair in rows]
        found.append(TargetError(timestep, max(e[0] for e in errors), max(e[1] for e in errors)))
    return found


def _errors(models: Predictors, latents: Tensor, timestep: int, rows: tuple[int, int]) -> tuple[float, float]:
    def both(unet: Predictor) -> list[Tensor]:
        conditions = [models.backbone.embeds.select([row] * SAMPLES) for row in rows]
        return [
            models.backbone.predict(unet, latents, models.noise.expand(timestep, SAMPLES), each) for each in conditions
        ]

    exact, stored = both(models.sampler), both(models.teacher)
    prediction = max(_relative(s, e) for s, e in zip(stored, exact, strict=True))
    return prediction, _relative(stored[0] - stored[1], exact[0] - exact[1])


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float32).tiny))


def check_teacher(cfg: TeacherConfig, errors: list[TargetError]) -> str:
    """A table for the log.

    Raises:
        UserError: the error is larger than ``teacher.max_error`` at some timestep.
    """
    worst = max(errors, key=lambda error: error.prediction)
    if not worst.prediction <= cfg.max_error:
        raise UserError(
            f"teacher.storage: {cfg.storage!r} moves the frozen model's predictions by {worst.prediction:.2%} at "
            f"timestep {worst.timestep}, and teacher.max_error allows {cfg.max_error:.2%}; use 'exact' or 'int8', or "
            "allow more"
        )
    listed = "  ".join(f"{e.timestep}: {e.prediction:.2%} ({e.concept:.1%})" for e in errors)
    return f"teacher in {cfg.storage}, error of the predictions by timestep (of what the concept adds): {listed}"
