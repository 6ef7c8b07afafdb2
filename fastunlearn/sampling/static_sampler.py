"""What stands in the place of a rollout where nothing walks.

What this is: the part that such windows have in common, and the windows and the loss of a method that has none.
What this is not: pictures of anchors (``anchor_windows.py``) or stored trajectories (``cached_windows.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.sampling.batch import Augmentation, GuidedPrediction, UnlearnBatch
from fastunlearn.sampling.key_steps import KeyStep


class StaticSampler:
    """Windows that every update draws anew from (seed, update, number): no trajectory, and so no state."""

    timesteps: list[int]
    """Of the sampler's steps."""

    def windows(self, step: KeyStep, augmentation: Augmentation | None) -> Iterator[UnlearnBatch]:
        """This update's micro-batches."""
        raise NotImplementedError

    def restart(self, step: KeyStep) -> None:
        """There is no trajectory to begin."""

    def advance(self, step: KeyStep, pairs: list[GuidedPrediction]) -> None:
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

    def windows(self, step: KeyStep, augmentation: Augmentation | None) -> Iterator[UnlearnBatch]:
        """None."""
        return iter(())
