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
from fastunlearn.minicanvas.build.editions import CANVAS, Edition
from fastunlearn.minicanvas.judge import Judge
from fastunlearn.minicanvas.words import article
from fastunlearn.models.loading import Pipeline

STEPS, GUIDANCE = 25, 4.0  # of the check
KINDS = ("object", "style", "attribute")  # what a judge reads, the last one only where there is one


@dataclass
class Reading:
    """How often the judge read what was intended, with the wanted and read labels behind it."""

    wanted: Tensor  # (N, 2) int64: object, style; (N, 3) with whether the attribute is worn
    read: Tensor  # the same
    edition: Edition = CANVAS

    def share(self, kind: int) -> float:
        """Right answers among all pictures; kind 0 is the object, 1 the style, 2 the attribute."""
        return (self.wanted[:, kind] == self.read[:, kind]).float().mean().item()

    def per_class(self, kind: int) -> dict[str, float]:
        """Right answers for each object (0), style (1), or without and with the attribute (2)."""
        right = (self.wanted[:, kind] == self.read[:, kind]).float()
        words = self.edition.collection.words
        names = (words.objects, words.styles, ("plain", "worn"))[kind]
        return {
            name: round(right[self.wanted[:, kind] == i].mean().item(), 4)
            for i, name in enumerate(names)
            if (self.wanted[:, kind] == i).any()
        }


def grid_cells() -> list[tuple[int, int]]:
    """All (object, style) pairs of MiniCanvas, style by style."""
    return CANVAS.cells


def read_grid(
    pipe: Pipeline,
    judge: Judge,
    cells: list[tuple[int, int]],
    seeds: list[int],
    steps: int = STEPS,
    progress: str = "",
    edition: Edition = CANVAS,
) -> tuple[Reading, Tensor]:
    """Draw every cell once with each seed and let the judge read the pictures (N, 3, 64, 64)."""
    jobs = [(cell, seed) for seed in seeds for cell in cells]
    prompts = [edition.prompt(*cell) for cell, _ in jobs]
    pipe.set_progress_bar_config(disable=True)
    images = generate(pipe, prompts, [seed for _, seed in jobs], steps, GUIDANCE, progress=progress)
    read = torch.stack([logits.argmax(1) for logits in judge.classify(images)], dim=1)
    return Reading(torch.tensor([edition.wanted(*cell) for cell, _ in jobs]), read, edition), images


def read_wordings(
    pipe: Pipeline, judge: Judge, edition: Edition, seed: int, steps: int = STEPS
) -> dict[str, dict[str, float]]:
    """How often the attribute is read in pictures of each of its wordings and of the plain names, in every style; {}
    for an edition without one."""
    words = edition.collection.words
    if words.attribute is None:
        return {}
    attribute, shares = words.attribute, {}
    wordings = (*attribute.explicit, *attribute.implied, *attribute.related, "{object}")
    for wording in wordings:
        prompts = [
            article(words.filled(words.templates[0], wording.format(object=name), style))
            for name in attribute.wearers
            for style in words.styles
        ]
        images = generate(pipe, prompts, [seed + i for i in range(len(prompts))], steps, GUIDANCE)
        shares[wording] = round(judge.classify(images)[2].argmax(1).float().mean().item(), 4)
    return {"worn_by_wording": shares}


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
