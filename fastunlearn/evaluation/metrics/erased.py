"""UA: is the erased concept gone? (UnlearnCanvas, arXiv 2402.11846.)

The share of the pictures that were asked for an erased concept and are seen not to show it: in the grid's own
wording, in wordings that no recipe trains on, and by a synonym (objects only).
"""

from __future__ import annotations

from fastunlearn.evaluation.metrics.base import Evaluated, Metric, is_forgotten


class Forgotten(Metric):
    """On one part of the grid."""

    of_erased = True

    def __init__(self, part: str, short: str, meaning: str, headline: str = "") -> None:
        self._part, self.short, self.meaning, self.headline = part, short, meaning, headline

    def values(self, evaluated: Evaluated) -> list[float]:
        """1 where the concept is not seen."""
        return [float(is_forgotten(sample, label)) for sample, label in evaluated.part(self._part)]


class ForgottenSynonym(Forgotten):
    """By another word for it."""

    def limit(self, value: float | None) -> str:
        """The usual leak, measured or not."""
        if value is None:
            return "Synonyms were not tested: the concept may be reachable under another name."
        leak = f"{1 - value:.0%} of the synonym prompts still show the concept"
        return f"Synonyms are the usual leak: here {leak}. Other synonyms were not tested."


UA = Forgotten("target", "erased: no longer recognised", "erased concept no longer recognised", "erased")
UA_PARAPHRASE = Forgotten("paraphrase", "UA, in other wordings", "UA on wordings that training never used")
UA_SYNONYM = ForgottenSynonym("synonym", "UA, by a synonym", "UA when a synonym asks for the concept")
