"""Retain samples: noisy latents of what must be kept, with what the student should predict there.

The samples come from a pool of images (``image_pool.py``) or from trajectories that need none; one batch for each
micro-batch of an update, and the loss on it. What becomes of its gradient is decided in ``gradients/``.

Everything random is drawn from (seed, update, sample id), so that the same global batch gives the same samples on
any world size.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.prompts.variants import PromptTable
from fastunlearn.sampling.batch import BatchLayout
from fastunlearn.sampling.image_pool import LatentPool, generate_pool
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.rollout import Rollout, build_rollout
from fastunlearn.utils.distributed import World
from fastunlearn_kernels import weighted_noise_loss


@dataclass
class RetainBatch:
    """One micro-batch. ``latents`` are noisy; ``clean`` and ``noise`` are None where no picture is behind them."""

    latents: Tensor
    timesteps: Tensor
    cond: PromptEmbeds
    clean: Tensor | None = None
    noise: Tensor | None = None


class RetainSource(ABC):
    """Where the batches of an update come from."""

    @abstractmethod
    def batches(self, step: KeyStep, timestep: int) -> list[RetainBatch]:
        """This rank's micro-batches; ``timestep`` is that of the unlearning batch."""

    def state_dict(self) -> dict:
        """What a checkpoint needs; pictures are made again."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint."""
        if state:
            raise ValueError("pictures carry no state")


class PoolSource(RetainSource):
    """Pictures, noised anew in every update."""

    def __init__(
        self, cfg: Config, models: Predictors, prompt_table: PromptTable, layout: BatchLayout, pool: LatentPool
    ) -> None:
        self.cfg, self.models, self.prompt_table, self.layout, self.pool = cfg, models, prompt_table, layout, pool

    def batches(self, step: KeyStep, timestep: int) -> list[RetainBatch]:
        """Draw pictures, noise and, unless the key step's is used, timesteps."""
        numbers = self.layout.global_sample_ids()
        size = self.layout.batch
        return [self._batch(step, numbers[i : i + size], timestep) for i in range(0, len(numbers), size)]

    def _batch(self, step: KeyStep, numbers: Sequence[int], timestep: int) -> RetainBatch:
        rngs = [random.Random(f"{self.cfg.seed}:retain:{step.update}:{number}") for number in numbers]
        rows = [rng.randrange(len(self.pool.prompts)) for rng in rngs]
        backbone = self.models.backbone
        uniform = self.cfg.retain_timesteps == "uniform"
        times = [rng.randrange(len(backbone.noise)) if uniform else timestep for rng in rngs]
        cond = backbone.embeds.select([self.prompt_table.index[self.pool.prompts[row]] for row in rows])
        noisy = self.pool.noised(rows, times, rngs, backbone.noise)
        return RetainBatch(noisy.latents, noisy.timesteps, cond, noisy.clean, noisy.noise)


class TrajectorySource(RetainSource):
    """Prompts only: the student's own trajectories of what is kept, walked to the same key steps."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

    def batches(self, step: KeyStep, timestep: int) -> list[RetainBatch]:
        """Restart at the first update of a traversal; after that the trajectories continue by themselves."""
        if step.restart or not len(self.rollout.latents):
            self.rollout.restart(step)
        batches = [
            RetainBatch(batch.latents, batch.timesteps, batch.cond) for batch in self.rollout.batches(step, None)
        ]
        if step.continues:
            self.rollout.sampler_step(step.index)
        return batches

    def state_dict(self) -> dict:
        """The trajectories."""
        return self.rollout.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Continue the saved trajectories."""
        self.rollout.load_state_dict(state)


def retain_loss(models: Predictors, batch: RetainBatch, target: str) -> Tensor:
    """Mean squared error of the student against the frozen model's prediction, or against the noise that was added."""
    (student,) = models.train(batch.latents, batch.timesteps, batch.cond)
    if target == "noise":
        return noise_loss(models, batch, student)
    (teacher,) = models.frozen(batch.latents, batch.timesteps, batch.cond)
    return weighted_noise_loss(student, teacher, *one_set(student)).loss


def noise_loss(models: Predictors, batch: RetainBatch, prediction: Tensor) -> Tensor:
    """The ordinary training loss of a diffusion model: mean squared error against what the noise makes of a target."""
    assert batch.noise is not None
    return weighted_noise_loss(
        prediction,
        batch.noise,
        *one_set(prediction),
        x0=batch.clean,
        **models.noise.loss_arguments(batch.timesteps),
    ).loss


def one_set(prediction: Tensor) -> tuple[Tensor, Tensor]:
    """``set_B`` and ``weight_S`` of a plain mean over all samples."""
    device = prediction.device
    return torch.zeros(len(prediction), dtype=torch.long, device=device), torch.ones(1, device=device)


def build_source(
    cfg: Config, models: Predictors, prompt_table: PromptTable, world: World, pool: LatentPool | None
) -> RetainSource:
    """The source that ``retain.source`` names; ``pool``: its pictures, where they are there already."""
    layout = BatchLayout(world.rank, world.world_size, cfg.retain_batch_size, cfg.train.gradient_accumulation_steps)
    if cfg.retain_source != "prompts":
        if pool is None:
            texts = anchor_prompts(prompt_table) if cfg.retain_source == "anchors" else prompt_table.retained
            pool = generate_pool(cfg, models, prompt_table, texts)
        return PoolSource(cfg, models, prompt_table, layout, pool)
    # Another seed than the unlearning trajectories', so that the two do not start from the same noise.
    return TrajectorySource(build_rollout(cfg, models, prompt_table.of_retained(), layout, seed=cfg.seed + 1))


def anchor_prompts(prompt_table: PromptTable) -> list[str]:
    """Every prompt that asks for the same picture without a concept, once."""
    anchors = [variant.anchor for variants in prompt_table.variants for variant in variants if variant.anchor]
    return list(dict.fromkeys(anchors))
