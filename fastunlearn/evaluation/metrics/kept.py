"""IRA and CRA: is everything else still there? (UnlearnCanvas, arXiv 2402.11846.)

IRA is the accuracy on the kept prompts in the erased concept's own kind (other styles, when a style is erased), CRA in
the other kind (objects, when a style is erased); CRA_target is the accuracy in the other kind on the erased concept's
prompts (is the cat still a cat when neon is gone?). With several erased concepts IRA and CRA are means over the
concepts, so that with styles and objects mixed each kind counts as often as it was erased; CRA_target pools their
pictures.
"""

from __future__ import annotations

from fastunlearn.evaluation.metrics.base import OTHER_KIND, Evaluated, Metric, concept_of, is_right, mean


class Kept(Metric):
    """Accuracy on the kept prompts, in the erased concepts' kind or in the other one."""

    def __init__(self, part: str, other_kind: bool, short: str, meaning: str, headline: str = "") -> None:
        self._part, self._other = part, other_kind
        self.short, self.meaning, self.headline = short, meaning, headline

    def values(self, evaluated: Evaluated) -> list[float]:
        """For each picture, the mean over the concepts."""
        kinds = [OTHER_KIND[one.kind] if self._other else one.kind for one in evaluated.concepts]
        return [mean(is_right(sample, label, kind) for kind in kinds) for sample, label in evaluated.part(self._part)]


class KeptOnTarget(Metric):
    """Accuracy in the other kind on the prompts that ask for an erased concept."""

    short = "other kind, on the erased prompts"
    meaning = "other kind still recognised on the erased prompts"

    def values(self, evaluated: Evaluated) -> list[float]:
        """1 where it is seen."""
        pairs = evaluated.part("target")
        return [float(is_right(sample, label, OTHER_KIND[concept_of(sample).kind])) for sample, label in pairs]


SAME, OTHER = "same kind", "other kind"
IRA = Kept("kept", False, f"kept, {SAME}: still recognised", f"kept concepts of the {SAME} still recognised", SAME)
CRA = Kept("kept", True, f"kept, {OTHER}: still recognised", f"kept concepts of the {OTHER} still recognised", OTHER)
CRA_TARGET = KeptOnTarget()
IRA_PARAPHRASE = Kept("kept_paraphrase", False, "IRA, in other wordings", "IRA on those wordings")
CRA_PARAPHRASE = Kept("kept_paraphrase", True, "CRA, in other wordings", "CRA on those wordings")
