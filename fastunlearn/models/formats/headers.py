"""What a model's files say without being loaded: headers of safetensors files, the configurations of a folder.

Here are the refusals of folders that are damaged or hold another kind of model. A single file of a whole model is read
in ``single_file.py``; the checks of a run are in ``models/checks.py``. Torch is not imported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastunlearn.errors import UserError
from fastunlearn.registry import ARCHITECTURES

FIELD = "model.pretrained_model_name_or_path"
PIPELINES = sorted({architecture.pipeline for architecture in ARCHITECTURES.values()})
DENOISERS = {architecture.denoiser for architecture in ARCHITECTURES.values()}
TITLES = sorted(architecture.title for architecture in ARCHITECTURES.values())
EDITABLE = f"{', '.join(TITLES[:-1])} and {TITLES[-1]}"
ALLOWED = f"allowed are {' and '.join(PIPELINES)}, of {EDITABLE}"
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Part of a pipeline's class -> what its model is called. The first that fits is taken.
KNOWN_AS = {
    "Inpaint": "an inpainting model",
    "InstructPix2Pix": "InstructPix2Pix",
    "Upscale": "an upscaler",
    "Depth2Img": "a depth model",
    "ControlNet": "a ControlNet pipeline",
    "StableDiffusion3": "SD3",
    "Flux": "FLUX",
    "PixArt": "PixArt",
    "StableCascade": "Stable Cascade",
    "Kolors": "Kolors",
    "HunyuanDiT": "Hunyuan-DiT",
    "AuraFlow": "AuraFlow",
    "Sana": "Sana",
    "LatentConsistency": "a latent consistency model",
    "XLImg2Img": "SDXL's refiner, or a pipeline for it",
    "Img2Img": "an image-to-image pipeline",
}
CHANNELS = {9: "an inpainting model", 8: "InstructPix2Pix", 7: "an upscaler", 5: "a depth model"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors that a safetensors file declares, compared with its size, and its metadata.

    Raises:
        UserError: the file is truncated, is not safetensors, or declares more or less data than it holds.
    """
    try:
        with file.open("rb"), safe_open(file, framework="np") as opened:  # opened first for the system's own error
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            metadata = opened.metadata() or {}
            return {name: _entry(part.get_dtype(), part.get_shape()) for name, part in slices.items()}, metadata
    except SafetensorError:
        raise UserError(f"{str(file)!r} is corrupt: {_damage(file)}; download it again") from None
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read: {error.strerror or error}") from None


def _entry(dtype: str, shape: list[int]) -> Entry:
    bits = re.search(r"\d+", dtype)  # "BF16", "F8_E4M3"; without a number: "BOOL"
    return Entry(dtype, tuple(shape), math.prod(shape) * (int(bits[0]) if bits else 8) // 8)


def _damage(file: Path) -> str:
    """What is wrong with a file that safetensors refuses, in words and numbers that it does not give."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) == 8 and length > size - 8:
            return f"no safetensors header in {size} bytes"
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            declared = max(ends, default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return "its safetensors header is unreadable"
    if 8 + length + declared == size:
        return "its safetensors header is unreadable"
    return f"it declares {8 + length + declared} bytes and has {size}"


def check_safetensors(file: Path) -> int:
    """Compare what a safetensors header declares with the size of the file; return its number of elements.

    Raises:
        UserError: as ``read_header``.
    """
    return sum(entry.elements for entry in read_header(file)[0].values())


def is_hub_id(name: str) -> bool:
    """Whether ``name`` reads as "org/name" and not as a path: its first part is no folder here."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name.partition("/")[0]).exists()


def read_json(file: Path) -> dict[str, Any]:
    """A configuration, or {} where there is no such file.

    Raises:
        UserError: it is damaged.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{FIELD}: {str(file)!r} is damaged: no JSON object")
    return content


def check_folder(folder: Path, variant: str | None) -> None:
    """Refuse a diffusers folder that is incomplete, damaged, or of another kind of model.

    Raises:
        UserError: with the kind by name, or the file.
    """
    for component in check_kind(folder):
        _check_component(folder / component, variant)


def check_kind(folder: Path, named: str | None = None) -> list[str]:
    """Refuse another kind of model by its configurations alone; return the components that have weights.

    ``named``: what the user calls it, where that is not the folder.

    Raises:
        UserError: with the kind by name.
    """
    index, shown = folder / "model_index.json", repr(named or str(folder))
    if not index.is_file():
        raise UserError(f"{FIELD}: {shown} has no model_index.json; a whole diffusers pipeline is needed")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        pipeline = str(content["_class_name"])
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{FIELD}: {str(index)!r} is damaged: no JSON with a _class_name") from None
    reason = refusal(pipeline, content, read_json(folder / "unet" / "config.json"))
    if reason is not None:
        raise UserError(f"{FIELD}: {shown} {reason}; {ALLOWED}")
    return [component for component in COMPONENTS if _listed(content, component)]


def refusal(pipeline: str, index: Mapping[str, Any], unet: Mapping[str, Any]) -> str | None:
    """Why a model cannot be edited, from ``model_index.json`` and its U-Net's configuration; None: it can."""
    if pipeline not in PIPELINES:
        known = next((name for part, name in KNOWN_AS.items() if part in pipeline), None)
        return f"is {known} ({pipeline})" if known else f"is a {pipeline}"
    channels = unet.get("in_channels", 4)
    if channels != 4:
        return f"is {CHANNELS.get(channels, 'another model')}: its U-Net takes {channels} channels ({pipeline})"
    if unet.get("_class_name") not in (None, *DENOISERS):
        return f"has a {unet['_class_name']} for a U-Net"
    if unet.get("time_cond_proj_dim") is not None:
        return "is a latent consistency model: its U-Net is told the guidance scale"
    architecture = next(a for a in ARCHITECTURES.values() if a.pipeline == pipeline)
    return architecture.folder_refusal(index, unet)


def _listed(index: Mapping[str, Any], component: str) -> bool:
    """Whether ``model_index.json`` names a class for this component."""
    return (index.get(component) or [None])[0] is not None


def _check_component(folder: Path, variant: str | None) -> None:
    if not folder.is_dir():
        raise UserError(f"{FIELD}: {str(folder)!r} is missing, though model_index.json lists it")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{FIELD}: {str(folder)!r} holds no *.safetensors weights; pickled weights are not read")
    variants = {variant_of(file) for file in files}
    known = ", ".join(sorted(repr(known) for known in variants if known))
    if variant not in variants:
        if variant is None:
            raise UserError(f"model.variant: none given, but {str(folder)!r} only holds the variant {known}; set it")
        if folder.name == "unet" or None not in variants:  # other parts may lack the variant; diffusers falls back
            raise UserError(f"model.variant: {variant!r} is not in {str(folder)!r}; allowed: {known or 'none'}")
    for file in files:
        if variant_of(file) == (variant if variant in variants else None):
            check_safetensors(file)


def variant_of(file: Path) -> str | None:
    """``model.fp16.safetensors`` -> "fp16"; ``model.fp16-00001-of-00002.safetensors`` -> "fp16"; else None."""
    parts = re.sub(r"-\d{5}-of-\d{5}", "", file.name).split(".")
    return parts[1] if len(parts) == 3 else None


def unet_files(folder: Path, variant: str | None) -> list[Path]:
    """The files of a folder's U-Net in this variant."""
    return [file for file in sorted((folder / "unet").glob("*.safetensors")) if variant_of(file) == variant]


def vae_folder(folder: Path) -> Path:
    """Where the VAE of a folder is: itself, or ``vae`` in it where it is a whole pipeline's."""
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
