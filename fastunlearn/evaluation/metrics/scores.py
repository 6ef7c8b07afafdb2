"""From what the classifier saw to a result: each metric with its Wilson interval, accuracies of classes, confusion.

Pure functions on names. A figure says what this classifier sees on these prompts, nothing about attacks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastunlearn.evaluation.classifiers.base import Label
from fastunlearn.evaluation.metrics.base import Evaluated, concept_of, is_forgotten, is_right, mean
from fastunlearn.evaluation.pictures.grid import Erased, EvaluationSample
from fastunlearn.registry import METRICS

if TYPE_CHECKING:
    from torch import Tensor

Z_95 = 1.959963984540054
RECOGNISED = 0.8
"""Share of the unedited model's pictures in which a classifier must see what was asked for."""
Labelled = Sequence[tuple[EvaluationSample, Label]]


def headlines(of_erased: bool | None = None) -> dict[str, str]:
    """Metrics that stand in a run's last lines, and what each is about; all of them, or those of one question."""
    return {
        name: metric.headline
        for name, metric in METRICS.items()
        if metric.headline and of_erased in (None, metric.of_erased)
    }


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


def score(
    labelled: Labelled,
    concepts: Sequence[Erased],
    metrics: Sequence[str] = tuple(METRICS),
    images: Tensor | None = None,
) -> dict:
    """The figures of one model; JSON-ready. A figure without images is None.

    Keys: the names of ``metrics``; ``intervals`` {figure: [low, high]}; ``counts`` {figure: images};
    ``per_class`` {"object" | "style": {name: accuracy on that class's prompts}}; ``per_concept`` {name: UA};
    ``confusion`` {erased name: {what was seen instead: images}}; ``images`` {part: images}.

    Raises:
        UserError: a metric gives a picture a value outside [0, 1].
    """
    evaluated = Evaluated([sample for sample, _ in labelled], [label for _, label in labelled], concepts, images)
    values = {name: checked_values(name, evaluated) for name in metrics}
    result: dict = {name: mean(own) if own else None for name, own in values.items()}
    result["intervals"] = {name: list(wilson(result[name], len(own))) if own else None for name, own in values.items()}
    result["counts"] = {name: len(own) for name, own in values.items()}
    result["per_class"] = per_class(labelled)
    result["per_concept"] = {
        concept.name: mean(is_forgotten(c, seen) for c, seen in evaluated.part("target") if c.concept == concept)
        for concept in concepts
    }
    result["confusion"] = confusion(labelled, concepts)
    result["images"] = dict(Counter(sample.part for sample, _ in labelled))
    return result


def unrecognised(unedited: Mapping[str, Any], at_least: float = RECOGNISED) -> str | None:
    """Why figures of a classifier say nothing about a model: it does not see what the *unedited* model was asked for.

    ``unedited``: as ``score`` gives it, or the headline metrics by name. None: it sees it.
    """
    for name in headlines():
        value = unedited.get(name)
        share = None if value is None else 1.0 - value if METRICS[name].of_erased else value
        if share is not None and share < at_least:
            return (
                f"recognises what the unedited model was asked to draw in {share:.0%} of the pictures only "
                f"({METRICS[name].headline}; {at_least:.0%} are needed), so its figures would say nothing"
            )
    return None


def checked_values(name: str, evaluated: Evaluated) -> list[float]:
    """One value for each picture that counts.

    Raises:
        UserError: one is not in [0, 1].
    """
    values: list[float] = METRICS[name].values(evaluated)
    wrong = next((value for value in values if not 0.0 <= value <= 1.0), None)
    if wrong is not None:
        raise METRICS.mistake(name, f"it gives a picture the value {wrong:g}; from 0 to 1 is needed")
    return values


def per_class(labelled: Labelled) -> dict[str, dict[str, float]]:
    """Accuracy of each object and style: kept ones on the kept prompts, erased ones on the prompts asking for them."""
    hits: dict[str, dict[str, list[bool]]] = {"object": {}, "style": {}}
    for sample, seen in labelled:
        if sample.part == "kept":
            kinds: tuple[str, ...] = ("object", "style")
        elif sample.part == "target":
            kinds = (concept_of(sample).kind,)
        else:
            continue
        for kind in kinds:
            hits[kind].setdefault(getattr(sample, kind), []).append(is_right(sample, seen, kind))
    return {kind: {name: mean(right) for name, right in names.items()} for kind, names in hits.items()}


def confusion(labelled: Labelled, concepts: Sequence[Erased]) -> dict[str, dict[str, int]]:
    """What is seen, in the concept's own kind, on the prompts that ask for each erased concept; most often first."""
    rows = [(sample, seen) for sample, seen in labelled if sample.part == "target"]
    seen_for = {
        concept: Counter(getattr(seen, concept.kind) for sample, seen in rows if sample.concept == concept)
        for concept in concepts
    }
    return {concept.name: dict(counter.most_common()) for concept, counter in seen_for.items()}
