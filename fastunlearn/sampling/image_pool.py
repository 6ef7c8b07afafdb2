"""Pools of images as latents, made once: drawn by the frozen model, or read from a folder and encoded.

Each image is noised anew where it is used. There is no VAE in the training loop.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.config.run_prompts import folder_captions
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.models.backbone import Backbone
from fastunlearn.models.loading import Pipeline
from fastunlearn.models.noise_process import NoiseProcess
from fastunlearn.models.pipeline import image_side
from fastunlearn.prompts.variants import UNCONDITIONAL, PromptTable
from fastunlearn.sampling.pictures import read_picture

Predict = Callable[[Tensor, Tensor, PromptEmbeds, PromptEmbeds], tuple[Tensor, ...]]
"""(latents, timesteps, conditional, unconditional) -> the two predictions."""


class NoisyLatents(NamedTuple):
    """Noisy latents, and what they were made of."""

    latents: Tensor
    timesteps: Tensor
    clean: Tensor
    noise: Tensor


@dataclass
class LatentPool:
    """Clean latents (N, C, H, W) with one prompt each."""

    latents: Tensor
    prompts: list[str]

    def noised(
        self, rows: Sequence[int], times: Sequence[int], rngs: Sequence[random.Random], process: NoiseProcess
    ) -> NoisyLatents:
        """These images at these timesteps, with noise from the next number of each sample's own generator."""
        clean = self.latents[rows]
        generators = [torch.Generator().manual_seed(rng.getrandbits(63)) for rng in rngs]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators]).to(clean.device)
        timesteps = torch.tensor(times, device=clean.device)
        return NoisyLatents(process.add_noise(clean, noise, timesteps), timesteps, clean, noise)


@torch.no_grad()
def generate_pool(
    cfg: Config,
    models: Predictors,
    prompt_table: PromptTable,
    prompts: Sequence[str],
    name: str = "pool",
    count: int = 0,
) -> LatentPool:
    """Latents that the frozen model draws for the prompts; no VAE is involved. Prompts take turns in a
    shuffled order, each as often as the others.

    ``name``: of another pool of the same run, whose noise is its own; ``count``: other than ``retain.num_images``.
    """
    count, size = count or cfg.retain.num_images, cfg.retain_batch_size
    order = random.Random(f"{cfg.seed}:{name}")
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += order.sample(list(prompts), len(prompts))
    chosen = chosen[:count]
    seeds = [order.getrandbits(63) for _ in chosen]
    drawn = [
        _generate(cfg, models, prompt_table, chosen[first : first + size], seeds[first : first + size])
        for first in range(0, count, size)
    ]
    return LatentPool(torch.cat(drawn), chosen)


def _generate(
    cfg: Config, models: Predictors, prompt_table: PromptTable, prompts: list[str], seeds: list[int]
) -> Tensor:
    """One batch: clean latents (B, C, H, W)."""
    rows, nothing = [prompt_table.index[prompt] for prompt in prompts], prompt_table.index[UNCONDITIONAL]
    steps, scale = cfg.retain.num_inference_steps, cfg.retain.guidance_scale
    return draw_latents(models.backbone, models.frozen, rows, nothing, seeds, steps, scale, cfg.sampler.name)


def draw_latents(
    backbone: Backbone,
    predict: Predict,
    rows: Sequence[int],
    nothing: int,
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    sampler: str = "ddim",
) -> Tensor:
    """Clean latents (B, C, H, W) of prompts, each from its own noise, with classifier-free guidance.

    ``rows`` of the prompts, and of ``nothing``, among those of the run; ``steps`` of the ``sampler``.
    """
    noise, shape = backbone.noise, backbone.sample_shape
    cond, uncond = backbone.embeds.select(rows), backbone.embeds.select([nothing] * len(rows))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(cond.hidden.device)
    for timestep in noise.timesteps(steps):
        timesteps = noise.expand(timestep, len(latents))
        guided, unguided = predict(latents, timesteps, cond, uncond)
        latents = noise.step(guided, unguided, latents, timesteps, steps, guidance_scale, sampler)
    return latents


def encode_folder(cfg: Config, pipeline: Pipeline, device: torch.device) -> LatentPool:
    """The images of ``retain.folder`` as latents."""
    return encode_images(folder_captions(cfg), cfg, pipeline, device, "retain.folder")


@torch.no_grad()
def encode_images(
    pairs: Sequence[tuple[Path, str]], cfg: Config, pipeline: Pipeline, device: torch.device, field: str
) -> LatentPool:
    """Images as latents: scaled to the training size, centre-cropped, and encoded once."""
    pixels = image_side(pipeline, cfg.train.resolution)
    vae = pipeline.vae.to(device)
    latents = []
    for path, _ in pairs:
        picture = _square(path, pixels, field)
        values = torch.from_numpy(np.array(picture)).to(device, vae.dtype).permute(2, 0, 1)[None] / 127.5 - 1
        latents.append(vae.encode(values).latent_dist.mode() * vae.config["scaling_factor"])
    return LatentPool(torch.cat(latents).float(), [caption for _, caption in pairs])


def _square(path: Path, pixels: int, field: str) -> Image.Image:
    picture = read_picture(path, field)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    return picture.resize((pixels, pixels), Image.Resampling.LANCZOS, box=box)
