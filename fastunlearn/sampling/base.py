"""What a sampler is to the trainer: where the micro-batches of each update come from.

The samplers are in ``rollout.py``, ``anchor_sampler.py`` and ``cached_sampler.py``; ``factory.py`` chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.sampling.batch import Augmentation, GuidedPrediction, UnlearnBatch
from fastunlearn.sampling.key_steps import KeyStep


class BatchSampler(ABC):
    """Micro-batches of a run's updates."""

    timesteps: list[int]
    """Of the sampler's steps, from the noisy end; its own, so that no other sampler changes them."""

    @abstractmethod
    def batches(self, step: KeyStep, augmentation: Augmentation | None) -> Iterator[UnlearnBatch]:
        """This update's micro-batches. ``augmentation`` replaces the trained condition in the tail of a run."""

    @abstractmethod
    def restart(self, step: KeyStep) -> None:
        """Bring fresh trajectories to ``step.index``."""

    @abstractmethod
    def advance(self, step: KeyStep, predictions: list[GuidedPrediction]) -> None:
        """One sampler step from ``step.index``, with predictions that training already made."""

    @abstractmethod
    def state_dict(self) -> dict:
        """What is carried from one update to the next."""

    @abstractmethod
    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint."""


class StaticSampler(BatchSampler):
    """Batches that every update draws anew from (seed, update, sample id): no trajectory, and so no state."""

    def restart(self, step: KeyStep) -> None:
        """There is no trajectory to begin."""

    def advance(self, step: KeyStep, predictions: list[GuidedPrediction]) -> None:
        """There is no trajectory to continue."""

    def state_dict(self) -> dict:
        """Nothing is carried from one update to the next."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""


class EmptySampler(StaticSampler):
    """Of a method that has no loss of its own: UCE and RECE, followed by a meta term."""

    def __init__(self, models: Predictors, steps: int) -> None:
        self.timesteps = models.noise.timesteps(steps)

    def batches(self, step: KeyStep, augmentation: Augmentation | None) -> Iterator[UnlearnBatch]:
        """None."""
        return iter(())
