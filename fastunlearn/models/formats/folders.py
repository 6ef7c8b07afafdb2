"""A diffusers folder without its weights: which kind of model it is, which files a run reads of it, what they lack.

Here are the refusals of folders that are damaged, incomplete or hold another kind of model. A single file of a whole
model is read in ``single_file.py``; the checks of a run are in ``models/checks.py``. Torch is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastunlearn.errors import UserError
from fastunlearn.models.formats.configurations import read_config
from fastunlearn.models.formats.foreign import (
    scheduler_class_refusal,
    scheduler_refusal,
    unet_refusal,
    vae_refusal,
)
from fastunlearn.models.formats.headers import FIELD, read_header
from fastunlearn.registry import ARCHITECTURES
from fastunlearn.utils.foreign import Unreadable, json_object

PIPELINES = sorted({architecture.pipeline for architecture in ARCHITECTURES.values()})
DENOISERS = {architecture.denoiser for architecture in ARCHITECTURES.values()}
TITLES = sorted(architecture.title for architecture in ARCHITECTURES.values())
EDITABLE = f"{', '.join(TITLES[:-1])} and {TITLES[-1]}"
ALLOWED = f"allowed are {' and '.join(PIPELINES)}, of {EDITABLE}"
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
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


CLASSES = {
    "unet": (("diffusers", "UNet2DConditionModel"),),
    "vae": (("diffusers", "AutoencoderKL"),),
    "text_encoder": (("transformers", "CLIPTextModel"),),
    "text_encoder_2": (("transformers", "CLIPTextModelWithProjection"),),
    "tokenizer": (("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")),
    "tokenizer_2": (("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")),
}
"""Component -> (library, class) of what is loaded. A class of another library could be a file of the folder itself."""
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}  # a text encoder's is "model"
OTHER_DTYPES = {"F8": "fp8", "F4": "fp4", "I8": "int8", "U8": "int8 or 4 bits"}


def check_folder(folder: Path, variant: str | None) -> list[str]:
    """Refuse a diffusers folder that is incomplete, damaged, or of another kind of model; return the components that
    have weights.

    Raises:
        UserError: with the kind by name, or the file.
    """
    components = check_kind(folder)
    for part in ("scheduler/scheduler_config.json", *(f"{component}/config.json" for component in components)):
        if not (folder / part).is_file():
            raise UserError(f"{FIELD}: {str(folder / part)!r} is missing, though model_index.json lists it")
    for component in components:
        read_config(folder / component / "config.json")
        for file in weight_files(folder / component, variant):
            check_dtypes(file)
    return components


def check_kind(folder: Path, named: str | None = None) -> list[str]:
    """Refuse another kind of model by its configurations alone; return the components that have weights.

    ``named``: what the user calls it, where that is not the folder. A configuration that is not there says nothing.

    Raises:
        UserError: with the kind by name, or the file and the field.
    """
    index, shown = folder / "model_index.json", repr(named or str(folder))
    if not index.is_file():
        raise UserError(f"{FIELD}: {shown} has no model_index.json; a whole diffusers pipeline is needed")
    content = read_config(index)
    reason = refusal(
        content,
        read_config(folder / "unet" / "config.json"),
        read_config(folder / "scheduler" / "scheduler_config.json"),
        read_config(folder / "vae" / "config.json"),
    )
    if reason is not None:
        raise UserError(f"{FIELD}: {shown} {reason}; {ALLOWED}")
    return [component for component in COMPONENTS if _listed(content, component)]


def refusal(
    index: Mapping[str, Any], unet: Mapping[str, Any], scheduler: Mapping[str, Any], vae: Mapping[str, Any]
) -> str | None:
    """Why a model cannot be edited, from ``model_index.json`` and its configurations ({}: not known); None: it can."""
    pipeline = index["_class_name"]
    if pipeline not in PIPELINES:
        known = next((name for part, name in KNOWN_AS.items() if part in pipeline), None)
        return f"is {known} ({pipeline})" if known else f"is a {pipeline}"
    channels = unet.get("in_channels", 4)
    if channels != 4:
        return f"is {CHANNELS.get(channels, 'another model')}: its U-Net takes {channels} channels ({pipeline})"
    if unet.get("_class_name") not in (None, *DENOISERS):
        return f"has a {unet['_class_name']} for a U-Net"
    architecture = next(a for a in ARCHITECTURES.values() if a.pipeline == pipeline)
    reason = architecture.folder_refusal(index, unet) or _foreign_class(index)
    if reason is not None:
        return reason
    sampler = index["scheduler"][1]  # is what is loaded, whatever its own file calls itself
    noise = scheduler_class_refusal(sampler)
    if noise is None and scheduler:
        noise = scheduler_refusal({"_class_name": sampler} | dict(scheduler))
    found = unet_refusal(unet) or noise or vae_refusal(vae)
    return None if found is None else f"cannot be edited: {found}"


def _foreign_class(index: Mapping[str, Any]) -> str | None:
    """Components that are loaded as a class that is not known here."""
    for component, known in CLASSES.items():
        named = index.get(component)
        if _listed(index, component) and tuple(named) not in known:  # type: ignore[arg-type]
            return f"has {'.'.join(map(str, named))} for a {component}, instead of {'.'.join(known[0])}"  # type: ignore[arg-type]
    missing = [name for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler") if not _listed(index, name)]
    if missing:
        return f"has no {missing[0]}"
    library, kind = index["scheduler"]
    return None if library == "diffusers" else f"has {library}.{kind} for a scheduler, instead of a class of diffusers"


def _listed(index: Mapping[str, Any], component: str) -> bool:
    """Whether ``model_index.json`` names a class for this component."""
    named = index.get(component)
    return isinstance(named, list) and named[0] is not None


def weight_files(folder: Path, variant: str | None, component: str | None = None) -> list[Path]:
    """The files that hold a component's weights in this variant: one, or the shards that its index lists.

    ``component``: which it is, where its folder has another name.

    Raises:
        UserError: there are none, not in this variant, or one of several shards is missing.
    """
    if not folder.is_dir():
        raise UserError(f"{FIELD}: {str(folder)!r} is missing, though model_index.json lists it")
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    if not files:
        raise UserError(f"{FIELD}: {str(folder)!r} holds no *.safetensors weights; pickled weights are not read")
    variants = {variant_of(file) for file in files}
    known = ", ".join(sorted(repr(known) for known in variants if known))
    if variant not in variants:
        if variant is None:
            raise UserError(f"model.variant: none given, but {str(folder)!r} only holds the variant {known}; set it")
        if "unet" in (component, folder.name) or None not in variants:  # others may lack it: diffusers falls back
            raise UserError(f"model.variant: {variant!r} is not in {str(folder)!r}; allowed: {known or 'none'}")
        variant = None
    stem = STEMS.get(component or folder.name, "model")
    infix = f".{variant}" if variant else ""
    indices = [folder / f"{stem}.safetensors.index{infix}.json", folder / f"{stem}{infix}.safetensors.index.json"]
    index = next((file for file in indices if file.is_file()), None)
    if index is not None:
        return _shards(index)
    whole = folder / f"{stem}{infix}.safetensors"
    if whole not in files:
        found = next(file.name for file in files if variant_of(file) == variant)
        raise UserError(f"{FIELD}: {str(folder)!r} holds {found!r}, and neither {whole.name!r} nor an index of shards")
    return [whole]


def _shards(index: Path) -> list[Path]:
    try:
        listed = json_object(index)["weight_map"].values()
        names = sorted(set(listed))
        if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise Unreadable("it leads to other files than *.safetensors beside it")
    except Unreadable as error:
        raise UserError(f"{FIELD}: {str(index)!r} is damaged: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{FIELD}: {str(index)!r} is damaged: no weight_map") from None
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{FIELD}: {str(index.parent)!r} lacks {len(missing)} of {len(names)} shards, such as {missing[0]!r}; "
            "download them again"
        )
    return [index.parent / name for name in names]


def check_dtypes(file: Path) -> None:
    """Refuse weights that are stored in fewer than 16 bits.

    Raises:
        UserError: the file and the type; or it is damaged.
    """
    for name, entry in read_header(file)[0].items():
        low = next((words for start, words in OTHER_DTYPES.items() if entry.dtype.startswith(start)), None)
        if low is not None:
            raise UserError(
                f"{FIELD}: {str(file)!r} holds weights in {low} ({name}); those of a model in fp16, bf16 or fp32 are "
                "needed, since an edit is smaller than what 8 bits can tell apart"
            )


def variant_of(file: Path) -> str | None:
    """``model.fp16.safetensors`` -> "fp16"; ``model.fp16-00001-of-00002.safetensors`` -> "fp16"; else None."""
    parts = re.sub(r"-\d{5}-of-\d{5}", "", file.name).split(".")
    return parts[1] if len(parts) == 3 else None


def vae_folder(folder: Path) -> Path:
    """Where the VAE of a folder is: itself, or ``vae`` in it where it is a whole pipeline's."""
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
