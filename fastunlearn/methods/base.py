"""What every erasure method provides to the trainer.

What this is: the contract, and the sampler predictions that methods share.
What this is not: any paper's mathematics; each method's own file holds that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.rollout import Augmentation, GuidedPrediction, UnlearnBatch


@dataclass
class MethodOutput:
    """A window's loss (fp32 scalar, with graph; None where only the method's own parts learn), and the guided pair if
    the trajectory goes on."""

    loss: Tensor | None
    pair: GuidedPrediction | None


class Method(ABC):
    """One erasure method. Built from the configuration, before any model is loaded."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    @abstractmethod
    def table(self) -> list[KeyStep]:
        """The ordered updates of the run."""

    @abstractmethod
    def loss(self, models: Predictors, window: UnlearnBatch) -> MethodOutput:
        """The loss of one window."""

    trajectories = True
    """Whether it trains on trajectories; otherwise on noised pictures of the anchors."""

    uses_ema = False
    """Whether a running mean of the weights walks the trajectories and is what remains (``ema.py``)."""

    closed_form = False
    """Whether it edits the U-Net in one step before any training (``concept_edit.py``); its own table is then empty."""

    def finish(self) -> dict[str, Tensor]:
        """After the student's step: what the method itself has to learn; returns figures for the log. Collective."""
        return {}

    def state_dict(self) -> dict:
        """What a checkpoint needs of the method itself."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state of its own")

    def augmentation(self, step: KeyStep) -> Augmentation | None:
        """Whether this update trains on an augmented prompt. By default never."""
        return None


def frozen_predictions(models: Predictors, window: UnlearnBatch, *conditions: str) -> tuple[Tensor, ...]:
    """The frozen model's predictions at a window's conditions ("cond", "anchor", "uncond"), made now or long ago."""
    if window.targets is not None:
        return tuple(window.targets[name] for name in conditions)
    return models.frozen(window.latents, window.timestep, *(getattr(window, name) for name in conditions))


def sampler_pair(
    models: Predictors, window: UnlearnBatch, cond: Tensor | None, uncond: Tensor | None
) -> GuidedPrediction | None:
    """The guided pair that advances a trajectory, from predictions at hand where possible.

    ``cond`` and ``uncond`` are the student's predictions at the window's own prompt and at the unconditional one, or
    None where training did not make them; what is missing is evaluated without a gradient, in one call.
    """
    if not window.advance:
        return None
    if cond is None and uncond is None:
        return GuidedPrediction(*models.rollout(window.latents, window.timestep, window.cond, window.uncond))
    if uncond is None:
        (uncond,) = models.rollout(window.latents, window.timestep, window.uncond)
    if cond is None:
        (cond,) = models.rollout(window.latents, window.timestep, window.cond)
    return GuidedPrediction(cond.detach(), uncond.detach())
