"""From what the judge saw to figures: UA, IRA, CRA, per class accuracies, confusion rows and Wilson intervals.

What this is: pure functions on names. Definitions follow UnlearnCanvas (Zhang et al., arXiv:2402.11846):

* UA: share of the images that were asked for an erased concept and are judged not to show it.
* IRA: accuracy on the kept prompts in the erased concept's own kind (other styles, when a style is erased).
* CRA: accuracy on the kept prompts in the other kind (objects, when a style is erased).
* CRA_target: accuracy in the other kind on the erased concept's prompts (is the cat still a cat when neon is gone?).
* UA_paraphrase, IRA_paraphrase, CRA_paraphrase: the same on wordings that no recipe trains on.
* UA_synonym: UA with another word for the erased object; None where only styles are erased.

With several erased concepts, UA and CRA_target pool their images, IRA and CRA are means over the concepts; so with
styles and objects mixed each kind counts as often as it was erased.

What this is not: drawing or judging. A figure says what this judge sees on these prompts, nothing about attacks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastunlearn.evaluation.grid import Erased, EvaluationSample

Z_95 = 1.959963984540054
FIGURES = (
    "UA", "IRA", "CRA", "CRA_target", "UA_paraphrase", "IRA_paraphrase", "CRA_paraphrase", "UA_synonym",
)  # fmt: skip
OTHER_KIND = {"style": "object", "object": "style"}


@dataclass(frozen=True)
class Label:
    """What the judge saw in one image."""

    object: str
    style: str


Judged = Sequence[tuple[EvaluationSample, Label]]


def wilson(share: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval of a share observed on ``count`` images (Wilson 1927), 95 % by default.

    Also valid, only wider than needed, for a mean of per-image values in [0, 1]: their variance is at most that of a
    yes/no question with the same mean.

    Raises:
        ValueError: no images, or a share outside [0, 1].
    """
    if count < 1 or not 0.0 <= share <= 1.0:
        raise ValueError(f"a share in [0, 1] of at least one image is needed, got {share} of {count}")
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def clear_difference(before: float, after: float, count_before: int, count_after: int) -> bool:
    """Whether two shares differ by more than chance explains: Newcombe's interval of the difference excludes 0.

    The images of a pair share prompts and seeds, which this ignores: it errs towards "noise" (Newcombe 1998, no. 10).
    """
    low_b, high_b = wilson(before, count_before)
    low_a, high_a = wilson(after, count_after)
    if after >= before:
        return after - before > math.hypot(after - low_a, high_b - before)
    return before - after > math.hypot(high_a - after, before - low_b)


def score(judged: Judged, concepts: Sequence[Erased]) -> dict:
    """All figures of one model; JSON-ready. A figure without images is None.

    Keys: the names in `FIGURES`; ``intervals`` {figure: [low, high]}; ``counts`` {figure: images};
    ``per_class`` {"object" | "style": {name: accuracy on that class's prompts}}; ``per_concept`` {name: UA};
    ``confusion`` {erased name: {what was seen instead: images}}; ``images`` {part: images}.
    """
    own_kinds = [concept.kind for concept in concepts]
    values: dict[str, list[float]] = {}
    for suffix, target, kept in (("", "target", "kept"), ("_paraphrase", "paraphrase", "kept_paraphrase")):
        values["UA" + suffix] = [float(_forgotten(cell, seen)) for cell, seen in _part(judged, target)]
        rows = _part(judged, kept)
        for name, kinds in (("IRA", own_kinds), ("CRA", [OTHER_KIND[kind] for kind in own_kinds])):
            values[name + suffix] = [_mean(_right(cell, seen, kind) for kind in kinds) for cell, seen in rows]
    values["CRA_target"] = [
        float(_right(cell, seen, OTHER_KIND[_concept(cell).kind])) for cell, seen in _part(judged, "target")
    ]
    values["UA_synonym"] = [float(_forgotten(cell, seen)) for cell, seen in _part(judged, "synonym")]
    result: dict = {name: _mean(values[name]) if values[name] else None for name in FIGURES}
    result["intervals"] = {
        name: list(wilson(result[name], len(values[name]))) if values[name] else None for name in FIGURES
    }
    result["counts"] = {name: len(values[name]) for name in FIGURES}
    result["per_class"] = per_class(judged)
    result["per_concept"] = {
        concept.name: _mean(_forgotten(c, seen) for c, seen in _part(judged, "target") if c.concept == concept)
        for concept in concepts
    }
    result["confusion"] = confusion(judged, concepts)
    result["images"] = dict(Counter(cell.part for cell, _ in judged))
    return result


def per_class(judged: Judged) -> dict[str, dict[str, float]]:
    """Accuracy of each object and style: kept ones on the kept prompts, erased ones on the prompts asking for them."""
    hits: dict[str, dict[str, list[bool]]] = {"object": {}, "style": {}}
    for cell, seen in judged:
        if cell.part == "kept":
            kinds: tuple[str, ...] = ("object", "style")
        elif cell.part == "target":
            kinds = (_concept(cell).kind,)
        else:
            continue
        for kind in kinds:
            hits[kind].setdefault(getattr(cell, kind), []).append(_right(cell, seen, kind))
    return {kind: {name: _mean(right) for name, right in names.items()} for kind, names in hits.items()}


def confusion(judged: Judged, concepts: Sequence[Erased]) -> dict[str, dict[str, int]]:
    """What is seen, in the concept's own kind, on the prompts that ask for each erased concept; most often first."""
    rows = _part(judged, "target")
    seen_for = {
        concept: Counter(getattr(seen, concept.kind) for cell, seen in rows if cell.concept == concept)
        for concept in concepts
    }
    return {concept.name: dict(counter.most_common()) for concept, counter in seen_for.items()}


def _part(judged: Judged, part: str) -> list[tuple[EvaluationSample, Label]]:
    return [(cell, seen) for cell, seen in judged if cell.part == part]


def _right(cell: EvaluationSample, seen: Label, kind: str) -> bool:
    return getattr(seen, kind) == getattr(cell, kind)


def _concept(cell: EvaluationSample) -> Erased:
    if cell.concept is None:
        raise ValueError(f"{cell.part} cell without an erased concept: {cell.prompt!r}")
    return cell.concept


def _forgotten(cell: EvaluationSample, seen: Label) -> bool:
    concept = _concept(cell)
    return getattr(seen, concept.kind) != concept.name


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
