"""samples/relearn.png: how an erased concept comes back, and what else changes meanwhile.

The picture of one result, or of two runs beside each other. A line is the mean over the attack's seeds,
its band one standard deviation; thin lines are the seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastunlearn.evaluation.metrics.scores import headlines
from fastunlearn.utils.files import atomic_file

COLOURS = {"model": "#b2182b", "baseline": "#2166ac"}
ORIGINAL = "#555555"
# Panels: title, figures with the style of their lines
RECOGNISED = "Erased concept recognised", {"recognised": "-"}
STYLES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashes and dots"}
KEPT_LINES = dict(zip(headlines(of_erased=False), STYLES, strict=False))
KEPT = (
    "Kept: " + ", ".join(f"{headlines()[name]} ({STYLES[style]})" for name, style in KEPT_LINES.items()),
    KEPT_LINES,
)
ERROR = "Denoising error on held-out pictures of it", {"error": "-"}


def draw(result: dict, picture: Path) -> None:
    """Write the picture of what `relearn` returned."""
    from matplotlib.figure import Figure

    panels = [ERROR] if result["protocol"] is None else [RECOGNISED, KEPT, ERROR]
    figure = Figure(figsize=(1 + 4.2 * len(panels), 4.2), layout="constrained")
    for axes, (title, lines) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        _panel(axes, result, lines)
        axes.set_title(title, fontsize=10)
    concepts = ", ".join(result["concepts"])
    seeds = len(result["seeds"])
    figure.suptitle(
        f"Relearning {concepts}: attack {result['attack']}, {result['pictures']} pictures ({result['data']}), "
        f"learning rate {result['optimizer']['learning_rate']:g}, {seeds} seed{'s' * (seeds > 1)}",
        fontsize=11,
    )
    first = figure.axes[0]
    first.legend(fontsize=8, loc="upper right" if result["protocol"] is None else "lower right")
    with atomic_file(picture) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _panel(axes: Any, result: dict, lines: dict[str, str]) -> None:
    steps = result["steps"]
    curves = {"model": result} | ({"baseline": result["baseline"]} if result["baseline"] else {})
    for figure_name, style in lines.items():
        original = result["original"][figure_name]
        axes.axhline(original, color=ORIGINAL, linestyle=(0, (1, 1.5)) if style == "-" else (0, (1, 4)), linewidth=1.2,
                     label="original model")  # fmt: skip
        for which, curve in curves.items():
            _curve(axes, steps, curve, figure_name, COLOURS[which], style)
    if "recognised" in lines:
        _half(axes, result, curves)
    if "error" not in lines:
        axes.set_ylim(-0.03, 1.03)
    step_axis(axes, steps)
    axes.grid(alpha=0.25)


def _curve(axes: Any, steps: list[int], curve: dict, name: str, colour: str, style: str) -> None:
    mean = np.array(curve["summary"][name]["mean"])
    spread = np.array([value or 0.0 for value in curve["summary"][name]["spread"]])
    label = f"{curve['name']} ({curve['method']})"
    dense = np.linspace(0, steps[-1] ** 0.5, 1000) ** 2  # straight lines between the points are bent on this scale

    def line(values: Any, **look: Any) -> None:
        axes.plot(dense, np.interp(dense, steps, values), style, color=colour, **look)

    line(mean, linewidth=2, label=label)
    axes.plot(steps, mean, "o", color=colour, markersize=4)
    if len(curve["runs"]) > 1:
        low, high = (np.interp(dense, steps, mean + sign * spread) for sign in (-1, 1))
        axes.fill_between(dense, low, high, color=colour, alpha=0.15, linewidth=0)
        for run in curve["runs"]:
            line(run[name], linewidth=0.7, alpha=0.5)


def _half(axes: Any, result: dict, curves: dict[str, dict]) -> None:
    """Half of the original's share, and where each mean curve's seeds crossed it."""
    half = result["original"]["recognised"] / 2
    axes.axhline(half, color=ORIGINAL, linewidth=0.8, linestyle="--", label="half of the original")
    for which, curve in curves.items():
        for run in curve["runs"]:
            if run["steps_to_half"] is not None:
                axes.plot(run["steps_to_half"], half, "|", color=COLOURS[which], markersize=14, markeredgewidth=1.5)


def step_axis(axes: Any, steps: list[int]) -> None:
    """Early steps wide, late ones narrow: the first tens decide, and all points stay readable."""
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
    axes.set_xlim(0, steps[-1] * 1.02)
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()
    axes.set_xlabel("attack steps (square-root scale)")
