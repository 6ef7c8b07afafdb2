"""What can be measured: the interface of a subject, the size of its whole run, and how its U-Net calls are watched.

The trainer (``ours.py``) and the published ways (``baselines/``) are subjects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fastunlearn.denoisers.predictors import Evaluations, Predictors
from fastunlearn.sampling.key_steps import KeyStep
from update.instruments.clock import Clock


@dataclass(frozen=True)
class Whole:
    """A run that erases one concept: its updates, and its single-sample U-Net evaluations."""

    updates: int
    evaluations: Evaluations
    restart: int
    """Of the trajectories: those that bring fresh noise to a key step, or that are walked before training."""
    pool: int
    """Of the teacher's: before the first update, for pictures of what is kept and for cached targets."""


class Subject(Protocol):
    """Something that can be measured."""

    of_meta: Evaluations
    """Those of ``models.evaluations`` that a meta term has made."""

    @property
    def models(self) -> Predictors:
        """Who predicts, and counts."""

    def steps(self) -> Sequence[KeyStep]:
        """The updates of a run, in order."""

    def restart(self, step: KeyStep, index: int) -> None:
        """Fresh trajectories, walked through ``index`` steps of the sampler; the update that follows does not care."""

    def update(self, step: KeyStep) -> None:
        """One update, without a restart."""

    def watch(self, clock: Clock) -> None:
        """Tell the clock which calls belong to which phase."""


def watch_models(models: Predictors, clock: Clock) -> None:
    """The three ways to call a U-Net."""
    for method, label in (("rollout", "rollout"), ("frozen", "teacher"), ("train", "forward")):
        clock.watch(models, method, label)
