"""What a model's files say of it before any weights are loaded: its denoiser, its sizes, what loading it takes.

From a folder's configurations, a hub's, or the header of a single file. ``formats/`` refuses another kind of model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastunlearn.config import Config
from fastunlearn.errors import UserError
from fastunlearn.models.architectures.base import Architecture, architecture_of, pixels_per_latent
from fastunlearn.models.formats.configurations import read_config
from fastunlearn.models.formats.folders import COMPONENTS, DENOISERS, check_kind, variant_of
from fastunlearn.models.formats.headers import FIELD, check_safetensors, is_hub_id
from fastunlearn.models.formats.single_file import read_single_file
from fastunlearn.models.loading import hub_configs, resolve_model, stored_dtype
from fastunlearn.utils.memory_rows import FP32


@dataclass(frozen=True)
class ModelDescription:
    """A model without its weights."""

    unet: str
    """The text of ``unet/config.json``; text, so that it can be a key."""
    tokens: int
    """L, of an embedded prompt."""
    factor: int
    """Pixels per latent."""
    loading: int
    """Bytes of the whole pipeline, as it is loaded on the host; 0 where it is not known."""

    @property
    def config(self) -> dict[str, Any]:
        """The U-Net's configuration."""
        return json.loads(self.unet)

    @property
    def architecture(self) -> Architecture:
        """Its adapter."""
        return architecture_of(self.config)

    @property
    def text_width(self) -> int:
        """Of the token embeddings."""
        return self.architecture.text_width(self.config)

    def latent_shape(self, resolution: int | None) -> tuple[int, int, int]:
        """(C, H, W) of one sample, as ``backbone.build_backbone`` finds it."""
        side = resolution // self.factor if resolution else None
        return self.architecture.latent_shape(self.config, side)


def describe_model(cfg: Config) -> ModelDescription:
    """Of the model that a run edits. A hub's configurations are downloaded, or come from its cache.

    Raises:
        UserError: there is no such folder, no U-Net in it, or a kind of model that cannot be edited.
    """
    name = resolve_model(cfg.model.pretrained_model_name_or_path)
    place = Path(name)
    if not place.exists() and is_hub_id(name):
        return _described(_unet_config(hub_configs(name, cfg.model) / "unet" / "config.json"), {}, {}, 0)
    if place.is_file():
        found = read_single_file(place)
        known = found.public_model(cfg.model)
        return _described(json.dumps(dict(known.unet)), known.text_encoder, known.vae, FP32 * found.elements)
    if (place / "model_index.json").is_file():
        check_kind(place)
    text_encoder, vae = (read_config(place / part / "config.json") for part in ("text_encoder", "vae"))
    return _described(_unet_config(place / "unet" / "config.json"), text_encoder, vae, _loaded_bytes(cfg, place))


def _described(unet: str, text_encoder: Mapping[str, Any], vae: Mapping[str, Any], loading: int) -> ModelDescription:
    usual = architecture_of(json.loads(unet)).text_length
    tokens = text_encoder.get("max_position_embeddings", usual)
    return ModelDescription(unet, tokens, pixels_per_latent(vae), loading)


def _unet_config(file: Path) -> str:
    config = read_config(file)
    if not config:
        raise UserError(f"{FIELD}: {str(file)!r} cannot be read; a plan needs the U-Net's configuration")
    kind = config.get("_class_name")
    if kind not in DENOISERS:
        raise UserError(f"{FIELD}: {str(file)!r} is a {kind}; a {' or '.join(DENOISERS)} is needed")
    return json.dumps(config)


def _loaded_bytes(cfg: Config, folder: Path) -> int:
    """The pipeline on the host: in fp32, but the U-Net as it is stored where nothing is lost by that."""
    total, as_stored = 0, cfg.bf16_weights or not cfg.trains
    for component in COMPONENTS:
        elements: Counter[str | None] = Counter()
        for file in (folder / component).glob("*.safetensors"):
            elements[variant_of(file)] += check_safetensors(file)
        # Of several variants one is loaded; they have the same number of elements.
        width = stored_dtype(cfg.model).itemsize if component == "unet" and as_stored else FP32
        total += width * max(elements.values(), default=0)
    return total
