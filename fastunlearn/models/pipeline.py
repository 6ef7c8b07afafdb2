"""What is asked of a loaded diffusers pipeline: its architecture, its text encoders, its sizes, its sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler

from fastunlearn.models.architectures.base import Architecture, architecture_of
from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.models.loading import Pipeline


def architecture_of_pipeline(pipeline: Pipeline) -> Architecture:
    """The adapter of its denoiser."""
    return architecture_of(pipeline.unet.config)


def latent_shape(pipeline: Pipeline, resolution: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) of one sample; ``resolution``: side of the image in pixels, None: the model's own."""
    side = resolution // pipeline.vae_scale_factor if resolution else None
    return architecture_of_pipeline(pipeline).latent_shape(pipeline.unet.config, side)


def image_side(pipeline: Pipeline, resolution: int | None = None) -> int:
    """Side of the images in pixels."""
    return resolution or latent_shape(pipeline)[-1] * pipeline.vae_scale_factor


def text_encoders(pipeline: Pipeline) -> list[tuple[Any, Any]]:
    """(tokenizer, text encoder) in the order in which a prompt goes through them."""
    slots = architecture_of_pipeline(pipeline).text_encoders
    return [(getattr(pipeline, slot.tokenizer), getattr(pipeline, slot.name)) for slot in slots]


@contextmanager
def encoders_on(pipeline: Pipeline, device: torch.device) -> Iterator[None]:
    """The text encoders are on ``device`` for as long as the block lasts: SDXL's have 0.8 G parameters."""
    for _, encoder in text_encoders(pipeline):
        encoder.to(device)
    try:
        yield
    finally:
        for _, encoder in text_encoders(pipeline):
            encoder.to("cpu")


def encode_prompt(pipeline: Pipeline, prompt: str, device: torch.device) -> PromptEmbeds:
    """One prompt as its text encoders say it; gradients flow."""
    hidden, _, *pooled = pipeline.encode_prompt(
        prompt=prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return PromptEmbeds(hidden, pooled[0] if pooled else None)


@torch.no_grad()
def encode_prompts(
    pipeline: Pipeline, prompts: Sequence[str], device: torch.device | None = None, *, empty_as_text: bool = False
) -> PromptEmbeds:
    """Embed prompts as the pipeline would at inference; the empty prompt becomes the pipeline's own unconditional.

    ``device``: where the text encoders are; None: where the pipeline is. ``empty_as_text``: encode the empty prompt
    like any other, also where the pipeline's unconditional is zeros.

    SDXL-base uses zeros for an empty prompt (``force_zeros_for_empty_prompt``), other pipelines encode the empty
    caption. What is erased relative to "nothing" must be what sampling later uses as "nothing".
    """
    zeros = bool(pipeline.config.get("force_zeros_for_empty_prompt", False)) and not empty_as_text
    parts = []
    for prompt in prompts:
        embeds = encode_prompt(pipeline, prompt, device or pipeline.device)
        if prompt == "" and zeros:
            pooled = None if embeds.pooled is None else torch.zeros_like(embeds.pooled)
            embeds = PromptEmbeds(torch.zeros_like(embeds.hidden), pooled)
        parts.append(embeds)
    return PromptEmbeds.cat(parts)


def ddim_scheduler(pipeline: Pipeline) -> DDIMScheduler:
    """A deterministic DDIM sampler on the pipeline's own noise schedule and prediction type."""
    return DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False)
