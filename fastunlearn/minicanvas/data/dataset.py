"""Rendering: one drawing, moved about a little and put into one style, as a 64 x 64 picture.

Sample `i` of a set depends on its seed and on `i` only, so a data set is the same however many processes render it.
Captions are not drawn here (`words.py`): the trainers draw a fresh one each time a picture is used.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastunlearn.minicanvas.data import pictures
from fastunlearn.minicanvas.data.collection import CANVAS, Collection
from fastunlearn.minicanvas.data.styles import Style

SIZE = 64
OTHER = CANVAS.other
CHUNK = 200
FIELDS = ("images", "objects", "styles", "worn")


@dataclass(frozen=True)
class Recipe:
    """What to render; seeds make sets disjoint.

    `others` is the share of pictures that show none of the objects. `wide` is for the judge: half of the objects come
    from the extra drawings, and most drawings are bent and recoloured, so that it learns what a cat looks like and not
    four drawings by heart.
    """

    count: int
    seed: int
    sets: tuple[str, ...] = pictures.GENERATOR_SETS
    others: float = 0.0
    wide: bool = False
    collection: Collection = CANVAS


@dataclass
class Pictures:
    """Rendered pictures (N, 64, 64, 3) uint8 with their labels, (N,) int64 each: the object (the number after the last
    for none), the style, and 1 where the attribute is worn."""

    images: np.ndarray
    objects: np.ndarray
    styles: np.ndarray
    worn: np.ndarray


def place(drawing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Flip, turn (up to 8 degrees), scale (.80 to .95) and shift (up to 2 of 64 pixels) a premultiplied drawing."""
    angle = np.deg2rad(rng.uniform(-8, 8))
    scale = rng.uniform(0.80, 0.95)
    shift = rng.uniform(-4, 4, 2)
    flip = -1.0 if rng.random() < 0.5 else 1.0
    cos, sin, centre = np.cos(angle) / scale, np.sin(angle) / scale, (pictures.SIZE - 1) / 2
    matrix = np.array([[flip * cos, flip * sin], [-sin, cos]])
    offset = centre - matrix @ (centre + shift)
    coefficients = (matrix[0, 0], matrix[0, 1], offset[0], matrix[1, 0], matrix[1, 1], offset[1])
    picture = Image.fromarray((drawing * 255 + 0.5).astype(np.uint8), "RGBA")
    moved = picture.transform(picture.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    moved_array = np.asarray(moved, dtype=np.float32) / 255.0
    moved_array[..., :3] = np.minimum(moved_array[..., :3], moved_array[..., 3:])  # bicubic can overshoot
    return moved_array


def bend(drawing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn a premultiplied drawing by up to 30 degrees, move its corners by up to 14 of 128 pixels, turn its hues."""
    size = pictures.SIZE
    angle = np.deg2rad(rng.uniform(-30, 30)) if rng.random() < 0.5 else 0.0
    turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * (1 + 0.25 * abs(angle))
    corners = np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]]) @ turned * size / 2 + size / 2
    corners += rng.uniform(-14, 14, (4, 2))
    picture = Image.fromarray((drawing * 255 + 0.5).astype(np.uint8), "RGBA")
    quad = tuple(corners.ravel())
    bent = picture.transform(picture.size, Image.Transform.QUAD, quad, Image.Resampling.BILINEAR)
    array = np.asarray(bent, dtype=np.float32) / 255.0
    turn = rng.uniform(-70, 70) if rng.random() < 0.6 else 0.0
    array[..., :3] = np.clip(array[..., :3] @ _hue_matrix(np.deg2rad(turn)), 0, array[..., 3:])
    return array


def _hue_matrix(angle: float) -> np.ndarray:
    """Rotation of RGB colours about the grey axis (Rodrigues), transposed for row vectors."""
    third, root = 1 / 3, np.sqrt(1 / 3)
    cross = np.array([[0, -root, root], [root, 0, -root], [-root, root, 0]])
    rotation = np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * third
    return rotation.T.astype(np.float32)


def render(drawing: np.ndarray, style: Style, rng: np.random.Generator) -> np.ndarray:
    """One finished picture, (64, 64, 3) uint8."""
    large = style(place(drawing, rng), rng)
    small = large.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3))
    return (small.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def render_sample(recipe: Recipe, index: int) -> tuple[np.ndarray, int, int, bool]:
    """Picture `index` of a recipe with its object, its style and whether the attribute is worn; cells take turns."""
    rng = np.random.default_rng((recipe.seed, index))
    collection = recipe.collection
    picture_set = recipe.sets[rng.integers(len(recipe.sets))]
    names = list(collection.styles)
    style = index % len(names)
    draw = collection.styles[names[style]]
    if rng.random() < recipe.others:
        return _render_other(picture_set, draw, rng, collection), collection.other, style, False
    thing, worn = collection.looks[index // len(names) % len(collection.looks)]
    if worn:
        drawing = _dressed(picture_set, collection.words.objects[thing], collection)
    else:
        drawing = pictures.load_objects(picture_set, collection)[thing]
    if recipe.wide:
        extra = pictures.load_extra(collection.words.objects[thing], collection)
        drawing = _vary(drawing, () if worn else extra, rng)
    return render(drawing, draw, rng), thing, style, worn


def _dressed(picture_set: str, name: str, collection: Collection) -> np.ndarray:
    assert collection.words.attribute is not None
    folder = collection.pictures / picture_set
    return pictures.dressed(folder / f"{name}.png", folder / f"{collection.words.attribute.name}.png")


def _vary(drawing: np.ndarray, extra: tuple[np.ndarray, ...], rng: np.random.Generator) -> np.ndarray:
    if extra and rng.random() < 0.5:
        drawing = extra[rng.integers(len(extra))]
    return bend(drawing, rng) if rng.random() < 0.75 else drawing


def _render_other(picture_set: str, style: Style, rng: np.random.Generator, collection: Collection) -> np.ndarray:
    """None of the objects: usually another emoji, sometimes an empty canvas or the shreds of a picture."""
    kind = rng.random()
    if kind < 0.08:
        return render(np.zeros((pictures.SIZE, pictures.SIZE, 4), np.float32), style, rng)
    things = pictures.load_others(picture_set, collection)
    if kind < 0.86:
        return render(things[rng.integers(len(things))], style, rng)
    if kind < 0.93:  # an object torn into shuffled tiles is no object any more
        things = pictures.load_objects(picture_set, collection)
    picture = render(things[rng.integers(len(things))], style, rng)
    tiles = picture.reshape(4, 16, 4, 16, 3).swapaxes(1, 2).reshape(16, 16, 16, 3)
    return tiles[rng.permutation(16)].reshape(4, 4, 16, 16, 3).swapaxes(1, 2).reshape(SIZE, SIZE, 3)


def _render_range(job: tuple[Recipe, int, int]) -> Pictures:
    recipe, start, stop = job
    samples = [render_sample(recipe, i) for i in range(start, stop)]
    return Pictures(*(np.stack([sample[k] for sample in samples]) for k in range(4)))


def render_all(recipe: Recipe, processes: int = 1, progress: str = "") -> Pictures:
    """Render a whole recipe; `progress` labels the progress bar ("" shows none)."""
    jobs = [(recipe, i, min(i + CHUNK, recipe.count)) for i in range(0, recipe.count, CHUNK)]
    bar = tqdm(total=recipe.count, desc=progress, unit="picture", disable=not progress)
    parts = []
    if processes > 1 and len(jobs) > 1:
        with ProcessPoolExecutor(min(processes, os.cpu_count() or 1)) as pool:
            for part in pool.map(_render_range, jobs):
                parts.append(part)
                bar.update(len(part.images))
    else:
        for job in jobs:
            parts.append(_render_range(job))
            bar.update(len(parts[-1].images))
    bar.close()
    return Pictures(*(np.concatenate([getattr(p, f) for p in parts]) for f in FIELDS))
