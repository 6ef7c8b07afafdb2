"""Whether two models are the same: by what their files hold, wherever these lie."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from fastunlearn.minicanvas import pipeline_path
from fastunlearn.models.formats.folders import COMPONENTS, variant_of
from fastunlearn.schema.sections import ModelConfig


def model_digest(model: ModelConfig) -> str | None:
    """SHA-256 over the weights and configurations of a model; None where there are no files (yet) to read.

    Of a folder, what a run reads of it: the components' weights in the variant asked for, and their configurations.
    Each file is read once in a process; SDXL takes some seconds.
    """
    place = _place(model)
    try:
        return None if place is None else _digest(place, model.variant)
    except OSError:
        return None


def _place(model: ModelConfig) -> Path | None:
    name = model.pretrained_model_name_or_path
    place = pipeline_path() if name == "minicanvas" else Path(name)
    if place.exists():
        return place
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(name, "model_index.json", cache_dir=model.cache_dir, revision=model.revision)
    except HFValidationError:
        return None
    return Path(index).parent if isinstance(index, str) else None


@cache
def _digest(place: Path, variant: str | None) -> str:
    whole = hashlib.sha256()
    for file in _files(place, variant):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{file.relative_to(place).as_posix()} {content}\n".encode())
    return whole.hexdigest()


def _files(place: Path, variant: str | None) -> list[Path]:
    """What a run reads of a folder; of one file, that file."""
    if place.is_file():
        return [place]
    configurations = sorted(place.glob("scheduler/*.json"))
    for component in COMPONENTS:
        files = sorted((place / component).glob("*.safetensors"))
        chosen = [file for file in files if variant_of(file) == variant]
        configurations += [*sorted((place / component).glob("*.json")), *(chosen or files)]
    return configurations
