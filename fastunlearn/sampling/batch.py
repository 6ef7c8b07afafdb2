"""What the samplers hand to the methods: one micro-batch at one key step, and how the global batch is spread.

Importable without torch, because the methods' files are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds


@dataclass(frozen=True)
class BatchLayout:
    """How the global batch is spread: this rank has ``micro_batches`` groups of ``batch`` samples."""

    rank: int
    world_size: int
    batch: int
    micro_batches: int

    def global_sample_ids(self) -> list[int]:
        """Numbers of this rank's samples in the global batch, micro-batch by micro-batch."""
        return [
            (micro * self.world_size + self.rank) * self.batch + slot
            for micro in range(self.micro_batches)
            for slot in range(self.batch)
        ]


@dataclass
class UnlearnBatch:
    """One micro-batch at one key step: everything a method needs to compute its loss."""

    latents: Tensor
    timesteps: Tensor
    """(B,) int64."""
    cond: PromptEmbeds
    trained: PromptEmbeds
    anchor: PromptEmbeds
    uncond: PromptEmbeds
    augmented: bool
    advance: bool
    trains: bool = True
    """False where the model is only looked at."""
    noise: float = 1.0
    """The timestep's share of the schedule, known without asking the device; 1: pure noise."""
    targets: Mapping[str, Tensor] | None = None
    """The frozen model's predictions by condition, where they were made before training."""


@dataclass
class GuidedPrediction:
    """The student's conditional and unconditional predictions at a batch, which the sampler reuses."""

    cond: Tensor
    uncond: Tensor


@dataclass(frozen=True)
class Augmentation:
    """KSCU's tail: train on a perturbed prompt with ``noise`` * N(0, 1) added to its embedding."""

    noise: float
