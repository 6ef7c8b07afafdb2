"""Drawing many images with one pipeline, so that an image depends on its prompt and its seed and on nothing else.

The loop around a diffusers SD or SDXL pipeline that evaluation and sample pictures share. Each image's initial noise
comes from its own CPU generator, so two models, batch sizes or devices start from the same latent; the sampler is DDIM
with eta 0, which adds no noise later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.models.loading import Pipeline
from fastunlearn.models.pipeline import (
    architecture_of_pipeline,
    ddim_scheduler,
    encode_prompts,
    image_side,
    latent_shape,
)

ONE_AT_A_TIME = 512  # pixels of a side, above which images are drawn and decoded one by one
TILED = 1024  # above which one image is decoded in tiles, too


@torch.no_grad()
def generate(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 25,
    guidance: float = 4.0,
    batch_size: int = 20,
    progress: bool | str = False,
) -> Tensor:
    """Draw one image per (prompt, seed) pair, at the pipeline's own resolution.

    Args:
        pipe: an SD or SDXL pipeline; its scheduler is put back afterwards.
        prompts, seeds: N prompts (repetitions are embedded once) and N seeds.
        batch_size: at most so many at a time; one where a side has more than 512 pixels.
        progress: show a bar with the remaining time on stderr; a text names it.

    Returns:
        (N, 3, H, W) float32 on the CPU, in [0, 1].
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    distinct = list(dict.fromkeys(prompts))
    rows = {prompt: row for row, prompt in enumerate(distinct)}
    table = encode_prompts(pipe, [*distinct, ""])  # the last row is the unconditional
    images: list[Tensor] = []
    batch_size = images_at_a_time(image_side(pipe), batch_size)
    _spare_the_vae(pipe)
    own_scheduler = pipe.scheduler
    label = progress if isinstance(progress, str) else "drawing"
    try:
        pipe.scheduler = ddim_scheduler(pipe)
        with tqdm(total=len(prompts), desc=label, unit="image", disable=not progress) as bar:
            for start in range(0, len(prompts), batch_size):
                chunk = range(start, min(start + batch_size, len(prompts)))
                conditions = table.select([rows[prompts[i]] for i in chunk])
                latents = initial_latents(pipe, [seeds[i] for i in chunk])
                images.append(_draw(pipe, conditions, table.select([len(distinct)]), latents, steps, guidance))
                bar.update(len(chunk))
    finally:
        pipe.scheduler = own_scheduler
    return torch.cat(images) if images else torch.zeros(0, 3, image_side(pipe), image_side(pipe))


def images_at_a_time(side: int, wanted: int) -> int:
    """Of ``wanted`` images with this side in pixels: a VAE's decoder takes 3 GiB for one of 1024."""
    return 1 if side > ONE_AT_A_TIME else wanted


def _spare_the_vae(pipe: Pipeline) -> None:
    """Large images go through the VAE one by one, or in tiles."""
    side = image_side(pipe)
    if side > ONE_AT_A_TIME:
        pipe.vae.enable_slicing()
    if side > TILED:
        pipe.vae.enable_tiling()


def initial_latents(pipe: Pipeline, seeds: Sequence[int]) -> Tensor:
    """Standard normal noise, (B, C, H, W) fp32 on the CPU; row i depends on ``seeds[i]`` alone."""
    shape = latent_shape(pipe)
    return torch.stack([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


def _draw(
    pipe: Pipeline, conditions: PromptEmbeds, nothing: PromptEmbeds, latents: Tensor, steps: int, guidance: float
) -> Tensor:
    """One batch through the pipeline: (B, 3, H, W) float32 on the CPU."""
    unconditional = nothing.select([0] * len(conditions))
    side = image_side(pipe)
    prompts = architecture_of_pipeline(pipe).pipeline_arguments(conditions, unconditional)
    out = pipe(
        latents=latents.to(conditions.hidden.device, conditions.hidden.dtype),
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=side,
        width=side,
        output_type="pt",
        **prompts,
    )
    return out.images.float().cpu().clamp(0, 1)
