"""The grid of every object in every style: drawn, read by the judge, and put on one sheet.

For the command and for the check at the end of a build. The drawing itself is ``evaluation/pictures/drawing.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fastunlearn.evaluation.pictures.drawing import generate
from fastunlearn.minicanvas.judge import Judge
from fastunlearn.minicanvas.vocabulary import EVALUATION_TEMPLATE, OBJECTS, STYLES
from fastunlearn.models.loading import Pipeline

STEPS, GUIDANCE = 25, 4.0  # of the check


@dataclass
class Reading:
    """How often the judge read the intended object and style, with the wanted and read labels behind it."""

    wanted: Tensor  # (N, 2) int64: object, style
    read: Tensor  # (N, 2) int64

    def share(self, kind: int) -> float:
        """Right answers among all pictures; kind 0 is the object, 1 the style."""
        return (self.wanted[:, kind] == self.read[:, kind]).float().mean().item()

    def per_class(self, kind: int) -> dict[str, float]:
        """Right answers for each object (0) or style (1)."""
        right = (self.wanted[:, kind] == self.read[:, kind]).float()
        names = (OBJECTS, STYLES)[kind]
        return {
            name: round(right[self.wanted[:, kind] == i].mean().item(), 4)
            for i, name in enumerate(names)
            if (self.wanted[:, kind] == i).any()
        }


def grid_cells() -> list[tuple[int, int]]:
    """All (object, style) pairs, style by style."""
    return [(thing, style) for style in range(len(STYLES)) for thing in range(len(OBJECTS))]


def read_grid(
    pipe: Pipeline,
    judge: Judge,
    cells: list[tuple[int, int]],
    seeds: list[int],
    steps: int = STEPS,
    progress: str = "",
) -> tuple[Reading, Tensor]:
    """Draw every cell once with each seed and let the judge read the pictures (N, 3, 64, 64)."""
    jobs = [(cell, seed) for seed in seeds for cell in cells]
    prompts = [EVALUATION_TEMPLATE.format(object=OBJECTS[o], style=STYLES[s]) for (o, s), _ in jobs]
    pipe.set_progress_bar_config(disable=True)
    images = generate(pipe, prompts, [seed for _, seed in jobs], steps, GUIDANCE, progress=progress)
    object_logits, style_logits = judge.classify(images)
    read = torch.stack([object_logits.argmax(1), style_logits.argmax(1)], dim=1)
    return Reading(torch.tensor([cell for cell, _ in jobs]), read), images


def save_grid(images: Tensor, path: Path, columns: int, titles: list[str] | None = None, scale: int = 2) -> None:
    """Write pictures (N, 3, 64, 64) in [0, 1] as one PNG, with a title above each where given."""
    side, head = 64 * scale, 14 if titles else 0
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + head)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = i % columns * side, i // columns * (side + head)
        pixels = (image.permute(1, 2, 0).numpy() * 255 + 0.5).clip(0, 255).astype(np.uint8)
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), (x, y + head))
        if titles:
            pen.text((x + 2, y + 1), titles[i][: side // 6], fill="black")
    partial = path.with_name(f".{path.name}.partial.png")
    sheet.save(partial)
    partial.replace(path)
