"""samples/progress.png: how far each concept had gone at every probe, and what it cost what is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastunlearn.progress.reading import GONE
from fastunlearn.utils.files import atomic_file


def draw_progress(progress: Mapping[str, Any] | None, picture: Path) -> bool:
    """Draw what ``metrics.json`` says of the probes; False where there are none, or a single one."""
    if progress is None or len(progress["probes"]) < 2:
        return False
    from matplotlib.figure import Figure

    probes = progress["probes"]
    updates = [probe["update"] for probe in probes]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    for number, name in enumerate(progress["concepts"]):
        colour = f"C{number}"
        for probe in probes:
            moved = probe["moved"][number]
            upper.scatter([probe["update"]] * len(moved), moved, s=9, color=colour, alpha=0.35)
        upper.plot(updates, [probe["low"][number] for probe in probes], color=colour, label=f"{name}: lowest fifth")
        lower.plot(updates, [probe["share"][number] for probe in probes], color=colour, label=f"{name}: erased")
    drift = [(probe["update"], probe["drift"]) for probe in probes if probe["drift"] is not None]
    lower.plot(*zip(*drift, strict=True), color="black", linestyle=":", label="drift of what is kept")
    upper.axhline(GONE, color="grey", linewidth=0.7)
    upper.set_ylabel("moved (0: as before, 1: without it)")
    lower.set_ylabel("share of probes, drift")
    lower.set_xlabel("update")
    lower.set_xscale("symlog", base=2)
    lower.set_xticks(updates, [str(update) for update in updates], fontsize=7)
    lower.minorticks_off()
    for axes in (upper, lower):
        axes.axvline(progress["update"], color="green", linewidth=0.9, linestyle="--", label="the weights that remain")
        axes.legend(fontsize=7, loc="upper left")
    with atomic_file(picture) as partial:
        figure.savefig(partial, format="png", dpi=110)
    return True
