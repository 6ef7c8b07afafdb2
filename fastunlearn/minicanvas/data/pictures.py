"""The source drawings: which sets the generator, the judge and the tests may read, and how they are loaded.

Not the rendering (`dataset.py`). Licences and notices: `pictures/ATTRIBUTION.md`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from fastunlearn.minicanvas.vocabulary import OBJECTS

FOLDER = Path(__file__).parent.parent / "pictures"
SIZE = 128
GENERATOR_SETS = ("noto", "fluent", "twemoji")
JUDGE_SETS = (*GENERATOR_SETS, "emojione")  # the judge knows more drawings
HELD_OUT_SETS = ("noto-v1",)  # read by tests and reports only


@cache
def load_object(picture_set: str, name: str) -> np.ndarray:
    """The drawing of one object: (128, 128, 4) float32 RGBA in [0, 1], colour premultiplied by alpha."""
    with Image.open(FOLDER / picture_set / f"{name}.png") as picture:
        return _premultiplied(picture)


@cache
def load_objects(picture_set: str) -> tuple[np.ndarray, ...]:
    """All objects of a set, in the order of `OBJECTS`."""
    return tuple(load_object(picture_set, name) for name in OBJECTS)


@cache
def load_extra(name: str) -> tuple[np.ndarray, ...]:
    """Further drawings of one object, other designs and near relatives, which only the judge is trained on."""
    drawings = []
    for path in sorted((FOLDER / "extra").glob(f"{name}-*.png")):
        with Image.open(path) as picture:
            drawings.append(_premultiplied(picture))
    return tuple(drawings)


@cache
def load_others(picture_set: str) -> tuple[np.ndarray, ...]:
    """The emoji of a set that are none of the objects (the judge's class "other"); same format as the objects."""
    with Image.open(FOLDER / picture_set / "others.png") as sheet:
        cells = _premultiplied(sheet)
    corners = [(y, x) for y in range(0, cells.shape[0], SIZE) for x in range(0, cells.shape[1], SIZE)]
    parts = [np.ascontiguousarray(cells[y : y + SIZE, x : x + SIZE]) for y, x in corners]
    return tuple(part for part in parts if part[..., 3].max() > 0)


def _premultiplied(picture: Image.Image) -> np.ndarray:
    rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255.0
    rgba[..., :3] *= rgba[..., 3:]
    return rgba
