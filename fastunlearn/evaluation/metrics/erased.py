"""UA: is the erased concept gone? (UnlearnCanvas, arXiv 2402.11846.)

The share of the pictures that were asked for an erased concept and are judged not to show it: in the grid's own
wording, in wordings that no recipe trains on, and by a synonym (objects only).
"""

from __future__ import annotations

from fastunlearn.evaluation.metrics.base import Evaluated, Metric, is_forgotten


class Forgotten(Metric):
    """On one part of the grid."""

    def __init__(self, part: str, short: str, meaning: str) -> None:
        self._part, self.short, self.meaning = part, short, meaning

    def values(self, evaluated: Evaluated) -> list[float]:
        """1 where the concept is not seen."""
        return [float(is_forgotten(sample, label)) for sample, label in evaluated.part(self._part)]


UA = Forgotten("target", "erased: no longer recognised", "erased concept no longer recognised")
UA_PARAPHRASE = Forgotten("paraphrase", "UA, in other wordings", "UA on wordings that training never used")
UA_SYNONYM = Forgotten("synonym", "UA, by a synonym", "UA when a synonym asks for the concept")
