"""The model that is edited: prompt embeddings, added conditions, trainable scope.

What this is: everything that knows how diffusers lays out a Stable Diffusion model. The rest of the package sees a
``Backbone`` that turns (latents, timesteps, embeddings) into a prediction.
What this is not: loading (``loading.py``, whose functions are offered here too), or training: nothing here has a
gradient rule, a loss or an optimizer.

Shapes: B batch, C latent channels, H W latent size, L tokens, D embedding width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from fastunlearn.models.loading import Pipeline
from fastunlearn.models.noise_process import NoiseProcess

Predictor: TypeAlias = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class PromptEmbeds:
    """Text conditions: ``hidden`` (B, L, D) for cross-attention; ``pooled`` (B, P) for SDXL's text_time, else None;
    ``rows`` (B,), which of the run's prompts they are, where they are unchanged."""

    hidden: Tensor
    pooled: Tensor | None
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def select(self, rows: Sequence[int] | Tensor) -> PromptEmbeds:
        """The conditions of these rows, in this order."""
        index = torch.as_tensor(rows, device=self.hidden.device)
        pooled, numbers = (None if tensor is None else tensor[index] for tensor in (self.pooled, self.rows))
        return PromptEmbeds(self.hidden[index], pooled, numbers)

    def numbered(self) -> PromptEmbeds:
        """The same as the prompts of a run, each in its row."""
        return PromptEmbeds(self.hidden, self.pooled, torch.arange(len(self), device=self.hidden.device))

    def to(self, device: torch.device, dtype: torch.dtype) -> PromptEmbeds:
        """A copy on this device in this dtype."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return PromptEmbeds(self.hidden.to(device, dtype), pooled, None if self.rows is None else self.rows.to(device))

    @staticmethod
    def cat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """Stack along the batch axis."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        rows = [part.rows for part in parts if part.rows is not None]
        return PromptEmbeds(
            torch.cat([part.hidden for part in parts]),
            torch.cat(pooled) if pooled else None,
            torch.cat(rows) if len(rows) == len(parts) else None,
        )


@dataclass
class Backbone:
    """A U-Net with what is needed to call it and to walk its sampler. ``unet`` is in the compute dtype."""

    unet: UNet2DConditionModel
    noise: NoiseProcess
    embeds: PromptEmbeds
    time_ids: Tensor | None
    sample_shape: tuple[int, int, int]
    autocast: bool = False
    """Compute in bf16 from fp32 weights."""

    def predict(self, unet: Predictor, latents_BCHW: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """Call ``unet`` (the student, or the frozen teacher) in its own dtype; the prediction comes back in fp32
        (fp64 from a model in fp64, which only tests have).

        ``timesteps``: (B,) int64.
        """
        kwargs = {}
        if self.time_ids is not None:
            assert embeds.pooled is not None
            rows = len(latents_BCHW)
            kwargs["added_cond_kwargs"] = {
                "text_embeds": embeds.pooled,
                "time_ids": self.time_ids.to(embeds.pooled.dtype).expand(rows, -1),
            }
        sample = latents_BCHW.to(embeds.hidden.dtype)
        with torch.autocast(sample.device.type, torch.bfloat16, enabled=self.autocast):
            out = unet(sample, timesteps, encoder_hidden_states=embeds.hidden, return_dict=False, **kwargs)
        return out[0] if out[0].dtype == torch.float64 else out[0].float()


@torch.no_grad()
def encode_prompts(pipeline: Pipeline, prompts: Sequence[str], device: torch.device | None = None) -> PromptEmbeds:
    """Embed prompts as the pipeline would at inference; the empty prompt becomes the pipeline's own unconditional.

    ``device``: where the text encoders are; None: where the pipeline is.

    SDXL-base uses zeros for an empty prompt (``force_zeros_for_empty_prompt``), other pipelines encode the empty
    caption. What is erased relative to "nothing" must be what sampling later uses as "nothing".
    """
    zeros = bool(pipeline.config.get("force_zeros_for_empty_prompt", False))
    parts = []
    for prompt in prompts:
        encoded = pipeline.encode_prompt(
            prompt=prompt, device=device or pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        hidden, pooled = encoded[0], encoded[2] if len(encoded) == 4 else None
        if prompt == "" and zeros:
            hidden = torch.zeros_like(hidden)
            pooled = None if pooled is None else torch.zeros_like(pooled)
        parts.append(PromptEmbeds(hidden, pooled))
    return PromptEmbeds.cat(parts)


def ddim_scheduler(pipeline: Pipeline) -> DDIMScheduler:
    """A deterministic DDIM sampler on the pipeline's own noise schedule and prediction type."""
    return DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False)


def build_backbone(
    pipeline: Pipeline, prompts: Sequence[str], resolution: int | None, device: torch.device, dtype: torch.dtype
) -> Backbone:
    """Embed all prompts of the run, then keep only what training needs: text encoders and VAE are not referenced.

    The text encoders are on ``device`` only for that time: SDXL's have 0.8 G parameters.
    """
    encoders = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    encoders = [encoder for encoder in encoders if encoder is not None]
    for encoder in encoders:
        encoder.to(device)
    embeds = encode_prompts(pipeline, prompts, device).to(device, dtype).numbered()
    for encoder in encoders:
        encoder.to("cpu")
    unet = pipeline.unet
    factor = pipeline.vae_scale_factor
    size = resolution // factor if resolution else unet.config["sample_size"]
    time_ids = None
    if isinstance(pipeline, StableDiffusionXLPipeline):  # original size, upper left corner of the crop, target size
        pixels = float(size * factor)
        time_ids = torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]], device=device)
    return Backbone(
        unet=unet.to(device=device, dtype=dtype),
        noise=NoiseProcess(ddim_scheduler(pipeline), device),
        embeds=embeds,
        time_ids=time_ids,
        sample_shape=(unet.config["in_channels"], size, size),
    )


def compute_in(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Hold a U-Net in ``dtype`` and let it take and give what the rest of its pipeline is in, such as fp32.

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
