"""samples/surgery.png: where in the U-Net, and when in the run, erasing and keeping pulled in opposite directions.

What this is: the cosine between the two gradients, block by block, as it is logged, and its picture.
What this is not: the projection (``surgery.py``).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from fastunlearn.gradients.projection import Figures, Surgery, block_of
from fastunlearn.utils.files import atomic_file

LOG_NAME = "surgery_log.jsonl"
COLUMNS = 400  # updates are averaged into at most this many columns


class BlockCosines:
    """Turns a table per segment into cosines per block."""

    def __init__(self, surgery: Surgery) -> None:
        names = [block_of(segment) if surgery.cfg.granularity == "tensor" else segment for segment in surgery.segments]
        self.blocks = list(dict.fromkeys(names))
        index = {block: i for i, block in enumerate(self.blocks)}
        self._block = torch.tensor([index[name] for name in names])

    def of(self, figures: Figures) -> dict[str, float]:
        """Cosine in each block, by name."""
        values = figures.cosine_of_blocks(self._block, len(self.blocks)).tolist()
        return dict(zip(self.blocks, (round(value, 5) for value in values), strict=True))


def draw(log: Path, picture: Path) -> bool:
    """Draw the heat map of a run's log; False if there is nothing in it."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    if not rows:
        return False
    from matplotlib.figure import Figure

    blocks = list(rows[0]["cosine"])
    values = np.array([[row["cosine"][block] for block in blocks] for row in rows])
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
