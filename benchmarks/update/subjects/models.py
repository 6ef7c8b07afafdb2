"""The model of a row: a folder or file through the ordinary loader, or random weights made where they are used.

``sdxl-random`` and the like build the U-Net of a public architecture on the device itself, in bf16, with random prompt
embeddings, so that a GPU needs neither a disk nor the text encoders; what they draw is noise. All else is the trainer's
own ``prepare``: only the two functions that load a pipeline and embed its prompts are stood in for.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import DDIMScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from fastunlearn.config import Config
from fastunlearn.models.architectures.base import PublicModel
from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.models.backbone import Backbone, build_backbone
from fastunlearn.models.description import ModelDescription, describe_model
from fastunlearn.models.formats.folder_configs import PUBLIC_MODELS
from fastunlearn.models.loading import load_pipeline
from fastunlearn.models.noise_process import NoiseProcess
from fastunlearn.training import setup as assembly

SUFFIX = "-random"
SEED = 0


def random_architecture(name: str) -> PublicModel | None:
    """What ``sdxl-random`` or ``tiny-sdxl-random`` stands for; None for a folder, a file, a hub id or minicanvas."""
    return PUBLIC_MODELS.get(name.removesuffix(SUFFIX)) if name.endswith(SUFFIX) else None


def plan_model(cfg: Config) -> ModelDescription:
    """What the planner needs to know of a row's model."""
    architecture = random_architecture(cfg.model.pretrained_model_name_or_path)
    if architecture is None:
        return describe_model(cfg)
    return ModelDescription(
        json.dumps(dict(architecture.unet)), architecture.adapter.text_length, architecture.factor, 0
    )


@contextlib.contextmanager
def loading(cfg: Config, device: torch.device) -> Iterator[None]:
    """Inside, ``prepare`` finds the row's model."""
    architecture = random_architecture(cfg.model.pretrained_model_name_or_path)
    if architecture is None:
        yield
        return
    dtype = torch.bfloat16 if cfg.model.mixed_precision == "bf16" else torch.float32

    def load(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(unet=random_unet(architecture, device, dtype))

    def embed(
        pipeline: Any, prompts: Sequence[str], resolution: int | None, place: torch.device, kind: torch.dtype,
        *, autocast: bool,
    ) -> Backbone:  # fmt: skip
        return random_backbone(architecture, pipeline.unet, len(prompts), resolution, place, kind, autocast=autocast)

    with mock.patch.object(assembly, "load_pipeline", load), mock.patch.object(assembly, "build_backbone", embed):
        yield


def backbone_of(
    cfg: Config, prompts: Sequence[str], device: torch.device, dtype: torch.dtype, *, autocast: bool
) -> Backbone:
    """The row's model for a baseline, in ``dtype``."""
    architecture = random_architecture(cfg.model.pretrained_model_name_or_path)
    if architecture is None:
        pipeline = load_pipeline(cfg.model.pretrained_model_name_or_path, options=cfg.model)
        return build_backbone(pipeline, prompts, cfg.train.resolution, device, dtype, autocast=autocast)
    unet = random_unet(architecture, device, dtype)
    return random_backbone(architecture, unet, len(prompts), cfg.train.resolution, device, dtype, autocast=autocast)


def random_unet(architecture: PublicModel, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """PyTorch's own initialisation, made on the device in ``dtype``: no second copy is ever there."""
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return UNet2DConditionModel.from_config(dict(architecture.unet))
    finally:
        torch.set_default_dtype(before)


def random_backbone(
    architecture: PublicModel,
    unet: UNet2DConditionModel,
    prompts: int,
    resolution: int | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    autocast: bool,
) -> Backbone:
    """Normal prompt embeddings; row 0, the unconditional prompt, is zeros as SDXL's is."""
    adapter, draw = architecture.adapter, torch.Generator().manual_seed(SEED)
    hidden = torch.randn(prompts, adapter.text_length, adapter.text_width(unet.config), generator=draw)
    hidden[0] = 0
    pooled, width = None, adapter.pooled_width(unet.config)
    if width is not None:
        pooled = torch.randn(prompts, width, generator=draw)
        pooled[0] = 0
    shape = adapter.latent_shape(unet.config, resolution // architecture.factor if resolution else None)
    scheduler = DDIMScheduler.from_config(dict(architecture.scheduler), clip_sample=False, set_alpha_to_one=False)
    return Backbone(
        unet=unet.to(device=device, dtype=dtype),
        architecture=adapter,
        noise=NoiseProcess(scheduler, torch.device(device)),
        embeds=PromptEmbeds(hidden, pooled).to(device, dtype).numbered(),
        sample_shape=shape,
        fixed_inputs=adapter.fixed_inputs(shape[-1] * architecture.factor, device),
        autocast=autocast,
    )
