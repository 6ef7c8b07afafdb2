"""What one probe saw, as plain numbers.

Legend, all final latents drawn from the same noise: z_c what the original draws for a prompt with the concept, z_a for
the same prompt without it, z_s what the student draws now for the prompt with it; z_0 and z_k the original's and the
student's picture of what is kept, z_1 the original's from other noise:
    moved = |z_s - z_c| / |z_a - z_c|             0: as ever; 1: as far from it as what the prompt without it gives
    drift = |z_k - z_0| / mean |z_1 - z_0|        1: as far away as another picture
Not the projection on z_a - z_c: an erased concept often gives way to something else than what stands there without it,
and the plain distance orders runs by what a classifier still sees at least as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

GONE = 0.8
"""A picture that has moved further counts as gone."""
LOW = 0.2
"""The quantile that is looked at: a fifth of the pictures has moved less. Now and then one picture of eight stays where
it is while a classifier sees none any more; a lower quantile would wait for it, and harm the rest."""


@dataclass(frozen=True)
class Reading:
    """One probe after ``update`` updates: of each concept how far its pictures have moved, and the mean drift of what
    is kept; NaN where nothing was there to look at."""

    update: int
    moved: tuple[tuple[float, ...], ...]
    drift: float
    recognised: tuple[float, ...] | None = None
    """The share of each concept's pictures in which a classifier still sees it."""

    def share(self, concept: int) -> float:
        """Of the concept's pictures those that are gone."""
        moved = self.moved[concept]
        return sum(value > GONE for value in moved) / len(moved) if moved else math.nan

    def low(self, concept: int) -> float:
        """The low quantile of how far they have moved, interpolated between pictures."""
        return quantile(self.moved[concept], LOW)

    @property
    def worst_share(self) -> float:
        """Of the concept that is furthest from being erased."""
        return min(self.share(concept) for concept in range(len(self.moved)))

    @property
    def worst_low(self) -> float:
        """As ``worst_share``."""
        return min(self.low(concept) for concept in range(len(self.moved)))

    @property
    def least_moved(self) -> float:
        """The mean of how far a concept's pictures have moved, of the concept that has moved least."""
        means = [sum(moved) / len(moved) if moved else math.nan for moved in self.moved]
        return min(means)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Reading:
        """Of what ``as_json`` gave."""
        moved = tuple(tuple(values) for values in data["moved"])
        seen = data.get("recognised")
        drift = math.nan if data["drift"] is None else data["drift"]
        return cls(data["update"], moved, drift, None if seen is None else tuple(seen))

    def as_json(self) -> dict[str, Any]:
        """For a log or a checkpoint, with the share and quantile of every concept."""
        concepts = range(len(self.moved))
        figures = {"share": [self.share(i) for i in concepts], "low": [self.low(i) for i in concepts]}
        return asdict(self) | figures | {"drift": None if math.isnan(self.drift) else self.drift}


def quantile(values: Sequence[float], share: float) -> float:
    """Interpolated linearly; NaN of nothing."""
    return float(np.quantile(values, share)) if values else math.nan
