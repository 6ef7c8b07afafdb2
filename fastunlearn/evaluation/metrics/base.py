"""What every metric provides, and what it is handed: the pictures of one model, and what a classifier saw in them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastunlearn.evaluation.classifiers.base import Label
from fastunlearn.evaluation.pictures.grid import Erased, EvaluationSample

if TYPE_CHECKING:
    from torch import Tensor

OTHER_KIND = {"style": "object", "object": "style"}


@dataclass(frozen=True)
class Evaluated:
    """One model's pictures."""

    samples: Sequence[EvaluationSample]
    """What was asked for, (N,)."""
    labels: Sequence[Label]
    """What the classifier saw, (N,)."""
    concepts: Sequence[Erased]
    images: Tensor | None = None
    """(N, 3, H, W) fp32 in [0, 1] on the CPU, where a metric needs them."""

    def part(self, name: str) -> list[tuple[EvaluationSample, Label]]:
        """The samples of one part of the grid, with their labels."""
        return [pair for pair in zip(self.samples, self.labels, strict=True) if pair[0].part == name]


class Metric(ABC):
    """One figure: the mean of a value in [0, 1] for each picture that it looks at."""

    short: str
    """What it says, for a narrow table."""
    meaning: str
    """The same for the model card."""
    needs_images: bool = False
    """Whether it looks at the pictures themselves; else at the classifier's labels alone."""
    headline: str = ""
    """Whether it stands in a run's last lines and is followed by the relearning test, from labels alone: what it is
    about, in a word or two; "": it is on the tables only."""
    of_erased: bool = False
    """Whether it says how far the erased concepts are gone; else how well others are kept."""

    def limit(self, value: float | None) -> str | None:
        """A sentence for the model card on what must not be concluded, by the figure of the edited model (None: it was
        not measured); None: there is nothing to say."""
        return None

    @abstractmethod
    def values(self, evaluated: Evaluated) -> list[float]:
        """One value in [0, 1] for each picture that counts; none where there is no such picture."""


def is_right(sample: EvaluationSample, label: Label, kind: str) -> bool:
    """Whether the classifier saw what was asked for, in this kind ("object" or "style")."""
    return getattr(label, kind) == getattr(sample, kind)


def is_forgotten(sample: EvaluationSample, label: Label) -> bool:
    """Whether the erased concept that was asked for is not seen."""
    concept = concept_of(sample)
    return getattr(label, concept.kind) != concept.name


def concept_of(sample: EvaluationSample) -> Erased:
    """The erased concept that a sample asks for."""
    if sample.concept is None:
        raise ValueError(f"{sample.part} sample without an erased concept: {sample.prompt!r}")
    return sample.concept


def mean(values: Iterable[float]) -> float:
    """Of at least one value."""
    listed = list(values)
    return sum(listed) / len(listed)
