"""What a classifier saw in pictures that do not change, such as the base model's, kept between runs.

In ``~/.cache/fastunlearn`` (or ``$XDG_CACHE_HOME/fastunlearn``), under a hash of the model's weights, the classifier
and the grid. The folder may be deleted at any time; without it, or where it cannot be written, all is drawn again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from fastunlearn.errors import UserError
from fastunlearn.evaluation.classifiers.base import Label, LoadedClassifier
from fastunlearn.evaluation.pictures.grid import EvaluationGrid
from fastunlearn.utils.files import atomic_write_text, cache_folder
from fastunlearn.utils.foreign import parse_json, read_text


def remembered(
    base: str,
    unet_dir: Path | None,
    classifier: LoadedClassifier,
    grid: EvaluationGrid,
    device: str,
    draw: Callable[[], list[Label]],
) -> list[Label]:
    """What was seen of the base model, or of it with the U-Net in ``unet_dir``: as kept, else as drawn now."""
    file = _file(base, unet_dir, classifier, grid, device)
    seen = _read(file, classifier, len(grid.samples))
    if seen is None:
        seen = draw()
        _write(file, seen)
    return seen


def _file(base: str, unet_dir: Path | None, classifier: LoadedClassifier, grid: EvaluationGrid, device: str) -> Path:
    """Named by everything that the labels depend on."""
    key = hashlib.sha256(grid.digest().encode())
    key.update(f"{torch.__version__} {device}".encode())
    for file in sorted(Path(base).rglob("*.safetensors")):
        key.update(file.relative_to(base).as_posix().encode())
        key.update(file.read_bytes())
    for file in sorted(unet_dir.glob("*.safetensors")) if unet_dir else ():
        key.update(b"unet" + file.read_bytes())
    key.update(classifier.digest())
    return cache_folder() / f"judged-{key.hexdigest()[:32]}.json"


def _read(file: Path, classifier: LoadedClassifier, count: int) -> list[Label] | None:
    """The labels kept in ``file``; None where there are none or they are damaged."""
    try:
        pairs = parse_json(read_text(file))
        seen = [Label(name, style) for name, style in pairs]
        known = len(seen) == count and all(map(classifier.knows, seen))
    except (OSError, ValueError, TypeError):
        return None
    return seen if known else None


def _write(file: Path, seen: Sequence[Label]) -> None:
    # Only a shortcut: a home that cannot be written costs time, not the evaluation.
    with suppress(UserError):
        atomic_write_text(file, json.dumps([[label.object, label.style] for label in seen]))
