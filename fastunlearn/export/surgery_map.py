"""samples/surgery.png: where in the U-Net, and when in the run, erasing and keeping pulled in opposite directions.

The cosine between the two gradients, block by block, as ``training/recorder.py`` logs it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fastunlearn.utils.files import atomic_file

COLUMNS = 400  # updates are averaged into at most this many columns


def draw_surgery_map(log: Path, picture: Path) -> bool:
    """Draw the heat map of a run's log; False if there is nothing in it."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    if not rows:
        return False
    from matplotlib.figure import Figure

    blocks = list(rows[0]["cosine"])
    values = np.array([[row["cosine"][block] for block in blocks] for row in rows], dtype=float)  # null: not a number
    values = np.nan_to_num(values)
    parts = np.array_split(values, min(COLUMNS, len(values)))
    grid = np.stack([part.mean(0) for part in parts], axis=1)
    limit = max(float(np.abs(grid).max()), 1e-6)
    figure = Figure(figsize=(10, 1.6 + 0.22 * len(blocks)), layout="constrained")
    axes = figure.subplots()
    first, last = rows[0]["update"], rows[-1]["update"] + 1
    image = axes.imshow(
        grid, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest",
        extent=(first, last, len(blocks) - 0.5, -0.5),
    )  # fmt: skip
    axes.set_yticks(range(len(blocks)), blocks, fontsize=7)
    axes.set_xlabel("update")
    axes.set_title("Cosine between the gradients of erasing and of keeping (red: they conflict)", fontsize=10)
    figure.colorbar(image, ax=axes)
    with atomic_file(picture) as partial:
        figure.savefig(partial, format="png", dpi=110)
    return True
