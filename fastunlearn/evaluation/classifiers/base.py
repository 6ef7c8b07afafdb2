"""What every classifier provides, and which one looks at a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastunlearn.registry import CLASSIFIERS

if TYPE_CHECKING:
    from torch import Tensor

    from fastunlearn.config import Config
    from fastunlearn.evaluation.pictures.grid import EvaluationGrid


@dataclass(frozen=True)
class Label:
    """What a classifier saw in one image."""

    object: str
    style: str


class Classifier(ABC):
    """One classifier of pictures. Its file is importable without torch; weights are loaded by ``load``."""

    title: str
    """Who it is, for the model card: "Judged by ..."."""
    limits: str
    """What it cannot see, as a sentence for the model card."""

    @abstractmethod
    def why_not(self, cfg: Config) -> str | None:
        """None if it can evaluate this run, else the reason in a few words. No weights are loaded."""

    @abstractmethod
    def grid(self, cfg: Config, quick: bool = False) -> EvaluationGrid:
        """The pictures that it wants to see.

        Raises:
            ValueError: nothing is left to compare.
        """

    @abstractmethod
    def load(self, device: str) -> LoadedClassifier:
        """The classifier with its weights."""


class LoadedClassifier(ABC):
    """A classifier that can look."""

    @abstractmethod
    def look(self, images: Tensor) -> list[Label]:
        """What is seen on each of (N, 3, H, W) images in [0, 1]."""

    @abstractmethod
    def knows(self, label: Label) -> bool:
        """Whether it could have said that."""

    @abstractmethod
    def digest(self) -> bytes:
        """Whatever decides what it says, for a cache's key."""


def choose_classifier(cfg: Config) -> Classifier:
    """The one that ``evaluation.classifier`` names, or the first that can evaluate the run; if none can, the first."""
    if cfg.evaluation.classifier != "auto":
        chosen: Classifier = CLASSIFIERS[cfg.evaluation.classifier]
        return chosen
    known: list[Classifier] = list(CLASSIFIERS.values())
    return next((one for one in known if one.why_not(cfg) is None), known[0])
