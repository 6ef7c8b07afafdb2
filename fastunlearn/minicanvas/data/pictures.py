"""The source drawings and how they are loaded: (128, 128, 4) float32 RGBA in [0, 1], colour premultiplied by alpha.

Which sets the generator, the judge and the tests may read: `collection.py`. Not the rendering (`dataset.py`). Licences
and notices: `pictures/ATTRIBUTION.md`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from fastunlearn.minicanvas.data.collection import CANVAS, Collection

FOLDER = CANVAS.pictures
SIZE = 128
GENERATOR_SETS, JUDGE_SETS, HELD_OUT_SETS = CANVAS.generator_sets, CANVAS.judge_sets, CANVAS.held_out_sets
FACE, HAT = 0.78, 0.52  # how large the wearer and what it wears are drawn


def load_object(picture_set: str, name: str, collection: Collection = CANVAS) -> np.ndarray:
    """The drawing of one object."""
    return _load(collection.pictures / picture_set / f"{name}.png")


def load_objects(picture_set: str, collection: Collection = CANVAS) -> tuple[np.ndarray, ...]:
    """All objects of a set, in the order of the words."""
    return tuple(load_object(picture_set, name, collection) for name in collection.words.objects)


def load_extra(name: str, collection: Collection = CANVAS) -> tuple[np.ndarray, ...]:
    """Further drawings of one object, other designs and near relatives, which only the judge is trained on."""
    return _load_all(collection.pictures / "extra", f"{name}-*.png")


def load_others(picture_set: str, collection: Collection = CANVAS) -> tuple[np.ndarray, ...]:
    """The emoji of a set that are none of the objects (the judge's class "other"); same format as the objects."""
    return _load_sheet(collection.pictures / picture_set / "others.png")


@cache
def dressed(face: Path, hat: Path) -> np.ndarray:
    """A drawing of a head, made smaller, with another one on top of it."""
    wearer, worn = (_scaled(_load(path), share) for path, share in ((face, FACE), (hat, HAT)))
    top, left = SIZE - wearer.shape[0], (SIZE - wearer.shape[1]) // 2
    canvas = np.zeros((SIZE, SIZE, 4), np.float32)
    canvas[top:, left : left + wearer.shape[1]] = wearer
    rows = np.flatnonzero(worn[..., 3].max(1) > 0.5)
    worn = worn[rows[0] :]
    left = (SIZE - worn.shape[1]) // 2
    spot = canvas[: worn.shape[0], left : left + worn.shape[1]]
    spot[:] = worn + spot * (1 - worn[..., 3:])
    return canvas


def _scaled(drawing: np.ndarray, share: float) -> np.ndarray:
    side = round(SIZE * share)
    picture = Image.fromarray((drawing * 255 + 0.5).astype(np.uint8), "RGBA").resize((side, side), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float32) / 255.0


@cache
def _load(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return _premultiplied(picture)


@cache
def _load_all(folder: Path, pattern: str) -> tuple[np.ndarray, ...]:
    return tuple(_load(path) for path in sorted(folder.glob(pattern)))


@cache
def _load_sheet(path: Path) -> tuple[np.ndarray, ...]:
    cells = _load(path)
    corners = [(y, x) for y in range(0, cells.shape[0], SIZE) for x in range(0, cells.shape[1], SIZE)]
    parts = [np.ascontiguousarray(cells[y : y + SIZE, x : x + SIZE]) for y, x in corners]
    return tuple(part for part in parts if part[..., 3].max() > 0)


def _premultiplied(picture: Image.Image) -> np.ndarray:
    rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255.0
    rgba[..., :3] *= rgba[..., 3:]
    return rgba
