"""Pictures that users bring, as RGB of 8 bits: turned as their camera says, on white where they are transparent, scaled
by their depth.

The one reader of such files; what cannot be read is one line with its name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fastunlearn.errors import UserError

DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
"""Pillow's modes with more than 8 bits, all of them grey."""


def read_picture(path: Path, field: str) -> Image.Image:
    """One picture, mode "RGB". ``field``: what errors call its folder.

    Raises:
        UserError: it is no picture, is damaged, or would fill the memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of EXIF data that cannot be read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                return _rgb(ImageOps.exif_transpose(opened))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"{field}: {path.name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down"
        ) from None
    except Exception:  # decoders of many formats, on files of any content
        raise UserError(f"{field}: {path.name} cannot be read as an image") from None


def check_pictures(pairs: Iterable[tuple[Path, str]], field: str) -> None:
    """Read each picture of (picture, caption) once, so that a bad one is known before anything is loaded.

    Raises:
        UserError: as ``read_picture``, of the first.
    """
    for path, _ in pairs:
        read_picture(path, field)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in DEEP:
        values, clear = np.asarray(picture), picture.info.get("transparency")
        grey = _eight_bits(values, picture.mode)
        if isinstance(clear, int):  # the one value that stands for nothing
            grey[values == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        white = Image.new("RGBA", clear.size, "white")
        return Image.alpha_composite(white, clear).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of any depth, (H, W), as uint8. Floats are in [0, 1] or, where one is larger, in the units of 8 or 16
    bits."""
    numbers = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError("not finite")
    largest = float(numbers.max(initial=0.0))
    full = 65535.0
    if mode == "F":
        full = 1.0 if largest <= 1.0 else 255.0 if largest <= 255.0 else 65535.0
    elif mode == "I" and largest > 65535:
        full = 2.0**31 - 1
    return np.round(np.clip(numbers / full, 0, 1) * 255).astype(np.uint8)
