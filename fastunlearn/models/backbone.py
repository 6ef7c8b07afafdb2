"""The model that is edited, as training sees it: latents, timesteps and embedded prompts in, a prediction out.

How a pipeline is taken apart is in ``pipeline.py``, what its architecture wants in ``architectures/``, noise levels in
``noise_process.py``, loading in ``loading.py``.

Shapes: B batch, C latent channels, H W latent size, L tokens, D embedding width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastunlearn.models.architectures.base import Architecture
from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.models.loading import Pipeline
from fastunlearn.models.noise_process import NoiseProcess
from fastunlearn.models.pipeline import (
    architecture_of_pipeline,
    ddim_scheduler,
    encode_prompts,
    encoders_on,
    image_side,
    latent_shape,
)

Predictor: TypeAlias = Callable[..., tuple[Tensor, ...]]


@dataclass
class Backbone:
    """A denoiser with what is needed to call it and to walk its sampler. ``unet`` is in the compute dtype."""

    unet: Any  # a diffusers model
    architecture: Architecture
    noise: NoiseProcess
    embeds: PromptEmbeds
    """All prompts of the run."""
    sample_shape: tuple[int, int, int]
    """(C, H, W)"""
    fixed_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """What the architecture gives the denoiser with every sample alike, such as SDXL's time ids."""
    autocast: bool = False
    """Compute in bf16 from fp32 weights."""

    def predict(self, unet: Predictor, latents_BCHW: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """Call ``unet`` (the student, or the frozen teacher) in its own dtype; the prediction comes back in fp32
        (fp64 from a model in fp64, which only tests have).

        ``timesteps``: (B,) int64.
        """
        arguments = self.architecture.call_arguments(embeds, self.fixed_inputs, len(latents_BCHW))
        sample = latents_BCHW.to(embeds.hidden.dtype)
        with torch.autocast(sample.device.type, torch.bfloat16, enabled=self.autocast):
            out = unet(sample, timesteps, **arguments)
        return out[0] if out[0].dtype == torch.float64 else out[0].float()


def build_backbone(
    pipeline: Pipeline,
    prompts: Sequence[str],
    resolution: int | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    autocast: bool = False,
) -> Backbone:
    """Embed all prompts of the run, then keep only what training needs: text encoders and VAE are not referenced."""
    with encoders_on(pipeline, device):
        embeds = encode_prompts(pipeline, prompts, device).to(device, dtype).numbered()
    architecture = architecture_of_pipeline(pipeline)
    return Backbone(
        unet=pipeline.unet.to(device=device, dtype=dtype),
        architecture=architecture,
        noise=NoiseProcess(ddim_scheduler(pipeline), device),
        embeds=embeds,
        sample_shape=latent_shape(pipeline, resolution),
        fixed_inputs=architecture.fixed_inputs(image_side(pipeline, resolution), device),
        autocast=autocast,
    )


def compute_in(unet: nn.Module, dtype: torch.dtype) -> None:
    """Hold a denoiser in ``dtype`` and let it take and give what the rest of its pipeline is in, such as fp32.

    A pipeline whose text encoders and VAE are in fp32 can then draw with it. It is for drawing only, not for training.
    """
    unet.to(dtype)

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cast(entry) for name, entry in value.items()}
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(cast(value) for value in args), cast(kwargs)

    def after(_: nn.Module, args: tuple, kwargs: dict, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(value.float() for value in output)

    unet.register_forward_pre_hook(before, with_kwargs=True)
    unet.register_forward_hook(after, with_kwargs=True)
