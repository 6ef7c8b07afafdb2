"""The eight styles: each turns a drawing on a transparent ground into a finished picture.

A style is a function `(rgba, rng) -> rgb`: `rgba` is (128, 128, 4) float32 with premultiplied colour in [0, 1], `rng` a
NumPy generator for the few free choices (background, glow colour), and the result (128, 128, 3) in [0, 1];
`dataset.py` halves it to 64 x 64, which gives clean edges. Styles keep to shapes and colours and avoid grain, because a
small VAE has to carry them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

Style = Callable[[np.ndarray, np.random.Generator], np.ndarray]

PASTELS = np.array([[0.62, 0.84, 0.96], [0.98, 0.80, 0.62], [0.72, 0.90, 0.70], [0.93, 0.74, 0.86]], np.float32)
GLOWS = np.array([[1.0, 0.25, 0.75], [0.2, 0.95, 1.0], [0.45, 1.0, 0.35]], np.float32)
POP_GROUNDS = np.array([[1.0, 0.85, 0.1], [0.1, 0.8, 0.85], [1.0, 0.45, 0.65]], np.float32)
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def blur(plane: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of a (128, 128) or (128, 128, 3) array in [0, 1]."""
    picture = Image.fromarray((plane.clip(0, 1) * 255 + 0.5).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255.0


def dilate(plane: np.ndarray, size: int) -> np.ndarray:
    """The largest value within a square of `size` (odd) pixels."""
    picture = Image.fromarray((plane.clip(0, 1) * 255 + 0.5).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.MaxFilter(size)), dtype=np.float32) / 255.0


def over(rgba: np.ndarray, ground: np.ndarray | float) -> np.ndarray:
    """The drawing laid over `ground` (a number, a colour or a picture)."""
    return rgba[..., :3] + (1.0 - rgba[..., 3:]) * ground


def ramp(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, linear between."""
    return ((x - low) / (high - low)).clip(0, 1)


def lines(rgba: np.ndarray, threshold: float = 0.10) -> np.ndarray:
    """The contours inside and around the drawing as (128, 128) in [0, 1], about three pixels wide."""
    planes = [*np.moveaxis(blur(over(rgba, 1.0), 1.2), -1, 0), blur(rgba[..., 3], 1.2)]
    slopes = [np.hypot(*np.gradient(plane)) for plane in planes]
    return blur(dilate(ramp(np.max(slopes, axis=0), threshold * 0.6, threshold * 1.2), 3), 0.7)


def flat(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The drawing itself on a plain pastel ground."""
    return over(rgba, PASTELS[rng.integers(len(PASTELS))])


def ink(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Black pen on white paper: contours, and the dark parts filled."""
    dark = ramp(0.35 - over(rgba, 1.0) @ LUMA, 0.0, 0.02)
    black = np.maximum(lines(rgba), dark)[..., None]
    return 0.98 - 0.92 * np.repeat(black, 3, axis=-1)


def neon(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Glowing tubes on a night-blue wall."""
    colour = GLOWS[rng.integers(len(GLOWS))]
    tube = lines(rgba, 0.14)
    halo = blur(dilate(tube, 3), 5.0)
    light = np.array([0.03, 0.02, 0.10], np.float32) + colour * (0.75 * halo + 0.7 * tube)[..., None]
    return (light + 0.45 * (tube**2)[..., None]).clip(0, 1)


def blueprint(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White construction lines on blue paper with a wide grid."""
    paper = np.full((128, 128, 3), (0.08, 0.25, 0.62), np.float32)
    position = np.arange(128) % 32 < 2
    paper[position[:, None] | position[None, :]] += 0.09
    paper += (0.10 * rgba[..., 3])[..., None]
    return paper + (np.array([0.93, 0.96, 1.0], np.float32) - paper) * (0.92 * lines(rgba, 0.14))[..., None]


def sepia(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An old brown photograph: one tone, pale middle, dark corners."""
    grey = ramp(over(rgba, 0.93) @ LUMA, 0.05, 0.98)
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    fade = 1.0 - 0.42 * ramp(np.hypot(x, y), 0.55, 1.4)
    tone = (0.12 + 0.86 * grey) * fade
    return (tone[..., None] ** np.array([0.80, 1.15, 1.75], np.float32)).astype(np.float32)


def popart(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A screen print: few loud colours, thick black contour, dots on a loud ground."""
    ground = POP_GROUNDS[rng.integers(len(POP_GROUNDS))]
    y, x = np.mgrid[0:128, 0:128]
    dots = ramp(np.cos(x * np.pi / 16) * np.cos(y * np.pi / 16), 0.3, 0.5)[..., None]
    ground = ground * (1 - 0.28 * dots)
    body = rgba.copy()
    body[..., :3] = np.round(blur(over(rgba, 1.0), 1.0) * 2) / 2 * rgba[..., 3:]
    contour = ramp(blur(dilate(rgba[..., 3], 7), 1.0) - blur(rgba[..., 3], 1.0), 0.2, 0.6)[..., None]
    return over(body, ground * (1 - contour)) * (1 - 0.9 * ramp(lines(rgba, 0.2), 0.4, 1.0)[..., None])


def pixel(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A game sprite of sixteen by sixteen blocks on dark violet."""
    picture = over(rgba, np.array([0.20, 0.12, 0.34], np.float32))
    blocks = picture.reshape(16, 8, 16, 8, 3).mean((1, 3))
    return np.round(blocks * 7).repeat(8, 0).repeat(8, 1) / 7


def watercolor(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pale washes that run over the edge of the drawing on white paper."""
    wash = blur(over(rgba, 1.0), 6.0)
    alpha = blur(dilate(rgba[..., 3], 11), 4.0)[..., None]
    paint = blur(over(rgba, wash), 1.8)
    tint = 1.0 - (1.0 - paint) * 0.62
    rim = (blur(rgba[..., 3], 2.5) * (1 - blur(rgba[..., 3], 2.5)))[..., None]
    paper = np.array([0.985, 0.975, 0.95], np.float32)
    return ((paper + (tint - paper) * alpha) * (1 - 0.7 * rim)).clip(0, 1)


STYLE_FUNCTIONS: dict[str, Style] = {
    "flat": flat, "ink": ink, "neon": neon, "blueprint": blueprint, "sepia": sepia, "popart": popart, "pixel": pixel,
    "watercolor": watercolor,
}  # fmt: skip
