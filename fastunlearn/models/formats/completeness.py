"""Whether a model's files hold every tensor that its configuration asks for, known from headers before loading.

A tensor that is missing would otherwise be noticed after gigabytes were read, or be left as a random one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastunlearn.errors import UserError
from fastunlearn.models.architectures.base import PublicModel
from fastunlearn.models.formats.folders import weight_files
from fastunlearn.models.formats.headers import FIELD, Entry, read_header
from fastunlearn.models.formats.original_layout import Shape, original_tensors
from fastunlearn.utils.text import first_line

OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Of a VAE's attention in files that older releases of diffusers wrote, and that newer ones read."""
TEXT_PREFIX = "text_model."
VAE_PREFIXES = ("first_stage_model.", "vae.")


def check_component(folder: Path, component: str, config: Mapping[str, Any], variant: str | None) -> None:
    """Compare the weights in ``folder`` with the configuration of their component.

    Raises:
        UserError: no such component can be built, or a tensor is missing or has another shape.
    """
    entries: dict[str, Entry] = {}
    for file in weight_files(folder, variant, component):
        entries |= read_header(file)[0]
    try:
        expected = shapes_of(build(component, config))
    except Exception as error:  # libraries check their arguments in many ways
        raise UserError(
            f"{FIELD}: {str(folder / 'config.json')!r} describes no {component} that can be built: {first_line(error)}"
        ) from None
    found = {_today(name): entry for name, entry in entries.items()}
    _compare(repr(str(folder)), component, {_today(name): shape for name, shape in expected.items()}, found)


def check_single_file(file: Path, model: PublicModel, has_vae: bool) -> None:
    """Compare a single file with the public model that it is.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    entries = {_one_prefix(name): entry for name, entry in read_header(file)[0].items()}
    for component, expected in _expected(model).items():
        if component != "vae" or has_vae:
            _compare(repr(str(file)), component, expected, entries)


def component_shapes(model: PublicModel) -> dict[str, dict[str, Shape]]:
    """Name and shape of every tensor of each component, as in its file; no memory is taken for them."""
    configs = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    if model.text_encoder_2 is not None:
        configs["text_encoder_2"] = model.text_encoder_2
    return {
        name: {_filed(key, name): shape for key, shape in shapes_of(build(name, config)).items()}
        for name, config in configs.items()
    }


def build(component: str, config: Mapping[str, Any]) -> nn.Module:
    """A component by its configuration, without memory for its weights."""
    from diffusers import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        if component == "unet":
            return UNet2DConditionModel.from_config(dict(config))
        if component == "vae":
            return AutoencoderKL.from_config(dict(config))
        kind = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
        return kind(CLIPTextConfig(**config))


def shapes_of(part: nn.Module) -> dict[str, Shape]:
    """Name and shape of each of its tensors."""
    return {name: tuple(value.shape) for name, value in part.state_dict().items()}


def _expected(model: PublicModel) -> dict[str, dict[str, Shape]]:
    """Of each component, the names and shapes in the original layout."""
    found: dict[str, dict[str, Shape]] = {}
    for original in original_tensors(model, component_shapes(model)):
        found.setdefault(original.component, {})[_one_prefix(original.name)] = original.shape
    return found


def _compare(named: str, component: str, expected: Mapping[str, Shape], found: Mapping[str, Entry]) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        raise UserError(
            f"{FIELD}: {named} lacks {len(missing)} tensors of its {component}, such as {missing[0]}; take it as it "
            "was first published, or download it again"
        )
    # A convolution with a kernel of one and a matrix hold the same numbers; both are in use.
    other = next((n for n, shape in expected.items() if _matrix(shape) != _matrix(found[n].shape)), None)
    if other is not None:
        raise UserError(
            f"{FIELD}: {named} has a tensor of its {component} with shape {list(found[other].shape)[:8]}, and its "
            f"configuration asks for {list(expected[other])} ({other}); they belong to different models"
        )


def _matrix(shape: Sequence[int]) -> tuple[int, ...]:
    kernel = shape[2:]
    return tuple(shape[:2]) if math.prod(kernel) == 1 else tuple(shape)


def _today(name: str) -> str:
    """As the newest release of its library calls it."""
    name = name.removeprefix(TEXT_PREFIX)
    for old, new in OLD_NAMES.items():
        if ".attentions." in name:
            name = name.replace(old, new)
    return name


def _one_prefix(name: str) -> str:
    """A VAE has one of two prefixes."""
    return VAE_PREFIXES[0] + name.removeprefix(VAE_PREFIXES[1]) if name.startswith(VAE_PREFIXES[1]) else name


def _filed(key: str, component: str) -> str:
    """Published text encoders have a prefix that newer versions of transformers have dropped."""
    bare = component.startswith("text_encoder") and not key.startswith((TEXT_PREFIX, "text_projection."))
    return TEXT_PREFIX + key if bare else key
