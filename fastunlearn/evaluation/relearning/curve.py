"""What a relearning curve says in two numbers, and what several seeds say together.

Pure functions on the measured points; between them a curve is taken to be straight.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise


def steps_to_half(steps: Sequence[int], recognised: Sequence[float], original: float) -> float | None:
    """The first number of attack steps at which half of what the original model shows is back; None: never.

    Args:
        steps: increasing numbers of attack steps.
        recognised: share of the pictures in which the concept is seen, after each of them.
        original: the same share of the original model. Where it is 0 there is nothing to come back.
    """
    _check(steps, recognised)
    half = original / 2
    if half <= 0:
        return None
    if recognised[0] >= half:
        return float(steps[0])
    for i in range(1, len(steps)):
        low, high = recognised[i - 1], recognised[i]
        if high >= half:
            return steps[i - 1] + (steps[i] - steps[i - 1]) * (half - low) / (high - low)
    return None


def area(steps: Sequence[int], recognised: Sequence[float]) -> float:
    """The mean height of the curve: its area (trapezoids) divided by the number of steps; from 0 to 1."""
    _check(steps, recognised)
    if len(steps) == 1:
        return recognised[0]
    pieces = [
        (steps[i] - steps[i - 1]) * (recognised[i] + recognised[i - 1]) / 2 for i in range(1, len(steps))
    ]  # fmt: skip
    return sum(pieces) / (steps[-1] - steps[0])


def summary(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Mean and spread over seeds: {"mean", "spread", "reached", "seeds"}.

    ``spread`` is the sample standard deviation, None for fewer than two seeds. A seed without a value never got there:
    the mean of the others would then be too low, so mean and spread are None; ``reached`` counts the others.
    """
    found = [value for value in values if value is not None]
    complete = len(found) == len(values) and len(found) > 0
    return {
        "mean": statistics.fmean(found) if complete else None,
        "spread": statistics.stdev(found) if complete and len(found) > 1 else None,
        "reached": len(found),
        "seeds": len(values),
    }


def summary_at(runs: Sequence[Sequence[float]]) -> dict[str, list[float] | list[float | None]]:
    """Mean and sample standard deviation over seeds (rows) at each measured step (columns)."""
    columns = list(zip(*runs, strict=True))
    return {
        "mean": [statistics.fmean(column) for column in columns],
        "spread": [statistics.stdev(column) if len(column) > 1 else None for column in columns],
    }


def _check(steps: Sequence[int], recognised: Sequence[float]) -> None:
    if not steps or len(steps) != len(recognised) or any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"one value for each of increasing steps is needed, got {list(steps)} and {len(recognised)}")
