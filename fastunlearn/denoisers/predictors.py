"""The three ways in which a run calls the U-Net, and the count of what each costs.

Training calls (recorded for backward), rollout calls (the student, no gradient) and frozen calls (the
teacher), each batching several conditions into one call.

Counts are single-sample U-Net evaluations: a guided pair of a batch of 4 is 8. They do not depend on the machine.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fastunlearn.acceleration.text_kv_cache import PromptKeys
from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.models.backbone import Backbone, Predictor
from fastunlearn.models.noise_process import NoiseProcess


@dataclass
class Evaluations:
    """Single-sample U-Net evaluations so far."""

    teacher: int = 0
    rollout: int = 0
    student_forward: int = 0
    student_backward: int = 0
    probe: int = 0
    """Of the probes' pictures: the original's, and those of what would be kept if the run ended now."""

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(asdict(self).values())


class Predictors:
    """Student and teacher of one run. Every method returns one fp32 prediction (B, C, H, W) per condition given."""

    def __init__(
        self,
        backbone: Backbone,
        student: Predictor,
        weights: Predictor,
        teacher: Predictor,
        sampler: Predictor | None = None,
        frozen_keys: PromptKeys | None = None,
        own_keys: PromptKeys | None = None,
    ) -> None:
        """
        Args:
            student: for calls that are recorded.
            weights: the student's for calls without a gradient.
            teacher: the frozen model.
            sampler: what walks the trajectories; None: the student.
            frozen_keys: keys and values of the prompts for calls of the frozen model, if they are kept.
            own_keys: the same for calls of the student without a gradient, where it does not train them.
        """
        self.backbone = backbone
        self.evaluations = Evaluations()
        self._student, self._weights, self.teacher = student, weights, teacher
        self.sampler = sampler or weights
        self.frozen_keys, self.own_keys = frozen_keys, own_keys

    @property
    def noise(self) -> NoiseProcess:
        """The model's noise process."""
        return self.backbone.noise

    def retire_teacher(self) -> None:
        """All targets have been made: from now on the frozen model is gone."""
        self.teacher = no_teacher

    def state_dict(self) -> dict:
        """The count so far."""
        return asdict(self.evaluations)

    def load_state_dict(self, state: dict) -> None:
        """Continue counting."""
        self.evaluations = Evaluations(**state)

    def train(self, latents_BCHW: Tensor, timesteps: Tensor, *conditions: PromptEmbeds) -> tuple[Tensor, ...]:
        """The student, recorded for the backward pass that follows."""
        self.evaluations.student_forward += len(conditions) * len(latents_BCHW)
        self.evaluations.student_backward += len(conditions) * len(latents_BCHW)
        return self._call(self._student, latents_BCHW, timesteps, conditions)

    def attacked(self, unet: Predictor, latents_BCHW: Tensor, timesteps: Tensor, cond: PromptEmbeds) -> Tensor:
        """The weights that a simulated attack changes, recorded, in a call that the engine does not see."""
        self.evaluations.student_forward += len(latents_BCHW)
        self.evaluations.student_backward += len(latents_BCHW)
        (prediction,) = self._call(unet, latents_BCHW, timesteps, (cond,))
        return prediction

    @torch.no_grad()
    def student(self, latents_BCHW: Tensor, timesteps: Tensor, *conditions: PromptEmbeds) -> tuple[Tensor, ...]:
        """The student's own prediction as a target: no gradient, and not the sampler's weights where those differ."""
        self.evaluations.student_forward += len(conditions) * len(latents_BCHW)
        return self._call(self._weights, latents_BCHW, timesteps, conditions, self.own_keys)

    @torch.no_grad()
    def rollout(self, latents_BCHW: Tensor, timesteps: Tensor, *conditions: PromptEmbeds) -> tuple[Tensor, ...]:
        """The student without a gradient, or the average of its weights, for the sampler."""
        self.evaluations.rollout += len(conditions) * len(latents_BCHW)
        return self._call(self.sampler, latents_BCHW, timesteps, conditions, self.own_keys)

    @torch.no_grad()
    def probed(self, latents_BCHW: Tensor, timesteps: Tensor, *conditions: PromptEmbeds) -> tuple[Tensor, ...]:
        """What would be exported if the run ended now: the student, or the average of its weights."""
        self.evaluations.probe += len(conditions) * len(latents_BCHW)
        return self._call(self.sampler, latents_BCHW, timesteps, conditions, self.own_keys)

    @torch.no_grad()
    def frozen(self, latents_BCHW: Tensor, timesteps: Tensor, *conditions: PromptEmbeds) -> tuple[Tensor, ...]:
        """The original model."""
        self.evaluations.teacher += len(conditions) * len(latents_BCHW)
        return self._call(self.teacher, latents_BCHW, timesteps, conditions, self.frozen_keys)

    def _call(
        self,
        unet: Predictor,
        latents: Tensor,
        timesteps: Tensor,
        conditions: tuple[PromptEmbeds, ...],
        keys: PromptKeys | None = None,
    ) -> tuple[Tensor, ...]:
        batch = torch.cat([latents] * len(conditions))
        embeds = PromptEmbeds.cat(conditions)
        with nullcontext() if keys is None else keys.installed(embeds.rows):
            prediction = self.backbone.predict(unet, batch, timesteps.repeat(len(conditions)), embeds)
        return prediction.chunk(len(conditions))


def no_teacher(*_: object, **__: object) -> tuple[Tensor, ...]:
    """In the place of a teacher where all targets were made before training."""
    raise RuntimeError("there is no frozen model any more: teacher.storage is 'cached'")
