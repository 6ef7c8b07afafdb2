"""The six styles of edition v; what a style is: `data/styles.py`."""

from __future__ import annotations

import numpy as np

from fastunlearn.minicanvas.data.styles import LUMA, Style, blur, dilate, lines, over, ramp

HEAT = np.array([[0.05, 0.02, 0.25], [0.45, 0.05, 0.55], [0.92, 0.22, 0.25], [1.0, 0.65, 0.1], [1.0, 1.0, 0.75]])
STRIPES = np.array([[[0.98, 0.62, 0.70], [1.0, 0.78, 0.82]], [[0.45, 0.80, 0.72], [0.62, 0.90, 0.83]]], np.float32)


def chalk(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Coloured chalk on a dark green board: pale contours, and fills through which the board shows."""
    board = np.array([0.10, 0.24, 0.18], np.float32)
    fill = board + (over(rgba, 0.0) - board * rgba[..., 3:]) * 0.45
    line = blur(lines(rgba, 0.12), 0.8)[..., None]
    return fill + (np.array([0.95, 0.95, 0.88], np.float32) - fill) * 0.85 * line


def thermal(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A heat camera: brightness as a colour from blue over red to yellow, warm things on cold ground."""
    heat = 0.32 + 0.66 * ramp(over(rgba, 0.0) @ LUMA, 0.05, 0.95)
    heat = blur(heat * rgba[..., 3], 1.6)
    steps = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(heat, steps, HEAT[:, k]) for k in range(3)], axis=-1).astype(np.float32)


def emboss(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pressed into grey plaster, with light from the upper left."""
    height = blur(0.55 * rgba[..., 3] + 0.45 * over(rgba, 0.0) @ LUMA, 1.3)
    down, right = np.gradient(height)
    relief = 0.56 - 2.8 * (down + right)
    return np.repeat(relief[..., None], 3, axis=-1).clip(0, 1) * np.array([0.98, 0.95, 0.90], np.float32)


def sticker(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A glossy sticker with a broad white rim on a wall with slanting stripes."""
    pair = STRIPES[rng.integers(len(STRIPES))]
    y, x = np.mgrid[0:128, 0:128]
    wave = ramp(np.sin((x + y) * np.pi / 24), -0.2, 0.2)[..., None]
    wall = pair[0] + (pair[1] - pair[0]) * wave
    rim = ramp(blur(dilate(rgba[..., 3], 13), 1.5), 0.3, 0.7)[..., None]
    return over(rgba, wall + (1.0 - wall) * rim)


def duotone(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A poster in two inks: violet shadows, orange light."""
    grey = ramp(over(rgba, 0.80) @ LUMA, 0.1, 0.95)[..., None]
    dark, light = np.array([0.26, 0.05, 0.45], np.float32), np.array([1.0, 0.70, 0.30], np.float32)
    return dark + (light - dark) * grey


def xray(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A negative on black film: dark things shine, cyan in the middle tones."""
    bright = (1.0 - 0.85 * over(rgba, 0.0) @ LUMA) * rgba[..., 3]
    glow = np.maximum(0.62 * blur(bright, 0.8), 0.95 * lines(rgba, 0.2))[..., None]
    return (glow ** np.array([1.7, 0.95, 0.8], np.float32)) * 0.95 + np.array([0.01, 0.03, 0.05], np.float32)


V_STYLES: dict[str, Style] = {
    "chalk": chalk, "thermal": thermal, "emboss": emboss, "sticker": sticker, "duotone": duotone, "xray": xray,
}  # fmt: skip
