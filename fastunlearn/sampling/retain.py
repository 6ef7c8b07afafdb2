"""Retain samples: noisy latents of what must be kept, with what the student should predict there.

What this is: the pools (the model's own pictures as latents, or an image folder, encoded once) and the trajectories
that need no pictures, one batch per micro-batch of an update, and the loss on it.
What this is not: the use of its gradient (``surgery.py``). There is no VAE in the loop.

Everything random is drawn from (seed, update, sample number), so that the same global batch gives the same samples on
any world size.
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.config.run_prompts import refuse_erased
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.errors import UserError
from fastunlearn.models.backbone import PromptEmbeds
from fastunlearn.models.loading import Pipeline
from fastunlearn.models.noise_process import NoiseProcess
from fastunlearn.prompts.variants import UNCONDITIONAL, PromptPair, PromptTable
from fastunlearn.sampling.batch import BatchLayout
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.rollout import Rollout
from fastunlearn.utils.distributed import World
from fastunlearn_kernels import weighted_noise_loss

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass
class RetainBatch:
    """One micro-batch. ``latents`` are noisy; ``clean`` and ``noise`` are None where no picture is behind them."""

    latents: Tensor
    timesteps: Tensor
    cond: PromptEmbeds
    clean: Tensor | None = None
    noise: Tensor | None = None


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
        self, rows: Sequence[int], times: Sequence[int], draws: Sequence[random.Random], process: NoiseProcess
    ) -> NoisyLatents:
        """These pictures at these timesteps, with noise from the next number of each sample's own generator."""
        clean = self.latents[rows]
        seeds = [torch.Generator().manual_seed(draw.getrandbits(63)) for draw in draws]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=seed) for seed in seeds]).to(clean.device)
        timesteps = torch.tensor(times, device=clean.device)
        return NoisyLatents(process.add_noise(clean, noise, timesteps), timesteps, clean, noise)


class RetainSource(ABC):
    """Where the batches of an update come from."""

    @abstractmethod
    def batches(self, step: KeyStep, timestep: int) -> list[RetainBatch]:
        """This rank's micro-batches; ``timestep`` is that of the unlearning window."""

    def state_dict(self) -> dict:
        """What a checkpoint needs; pictures are made again."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint."""
        if state:
            raise ValueError("pictures carry no state")


class PoolSource(RetainSource):
    """Pictures, noised anew in every update."""

    def __init__(
        self, cfg: Config, models: Predictors, book: PromptTable, layout: BatchLayout, pool: LatentPool
    ) -> None:
        self.cfg, self.models, self.book, self.layout, self.pool = cfg, models, book, layout, pool

    def batches(self, step: KeyStep, timestep: int) -> list[RetainBatch]:
        """Draw pictures, noise and, unless the key step's is used, timesteps."""
        numbers = self.layout.global_sample_ids()
        size = self.layout.batch
        return [self._batch(step, numbers[i : i + size], timestep) for i in range(0, len(numbers), size)]

    def _batch(self, step: KeyStep, numbers: Sequence[int], timestep: int) -> RetainBatch:
        draws = [random.Random(f"{self.cfg.seed}:retain:{step.update}:{number}") for number in numbers]
        rows = [draw.randrange(len(self.pool.prompts)) for draw in draws]
        backbone = self.models.backbone
        uniform = self.cfg.retain_timesteps == "uniform"
        times = [draw.randrange(len(backbone.noise)) if uniform else timestep for draw in draws]
        cond = backbone.embeds.select([self.book.rows[self.pool.prompts[row]] for row in rows])
        noisy = self.pool.noised(rows, times, draws, backbone.noise)
        return RetainBatch(noisy.latents, noisy.timesteps, cond, noisy.clean, noisy.noise)


class TrajectorySource(RetainSource):
    """Prompts only: the student's own trajectories of what is kept, walked to the same key steps."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

    def batches(self, step: KeyStep, timestep: int) -> list[RetainBatch]:
        """Restart at the first update of a traversal; after that the trajectories go on by themselves."""
        if step.restart or not len(self.rollout.latents):
            self.rollout.restart(step)
        batches = []
        for window in self.rollout.windows(step, None):
            batches.append(RetainBatch(window.latents, window.timesteps, window.cond))
        if step.continues:
            self.rollout.walk(step.index)
        return batches

    def state_dict(self) -> dict:
        """The trajectories."""
        return self.rollout.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Continue the saved trajectories."""
        self.rollout.load_state_dict(state)


def retain_loss(models: Predictors, batch: RetainBatch, target: str) -> Tensor:
    """Mean squared error of the student against the frozen model's prediction, or against the noise that was added."""
    (student,) = models.train(batch.latents, batch.timesteps, batch.cond)
    if target == "noise":
        return noise_loss(models, batch, student)
    (teacher,) = models.frozen(batch.latents, batch.timesteps, batch.cond)
    return weighted_noise_loss(student, teacher, *one_set(student)).loss


def noise_loss(models: Predictors, batch: RetainBatch, prediction: Tensor) -> Tensor:
    """The ordinary training loss of a diffusion model: mean squared error against what the noise makes of a target."""
    assert batch.noise is not None
    return weighted_noise_loss(
        prediction,
        batch.noise,
        *one_set(prediction),
        x0=batch.clean,
        alpha_t=models.noise.alpha_bar(batch.timesteps),
        prediction_type=models.noise.prediction_type,
    ).loss


def one_set(prediction: Tensor) -> tuple[Tensor, Tensor]:
    """``set_B`` and ``weight_S`` of a plain mean over all samples."""
    device = prediction.device
    return torch.zeros(len(prediction), dtype=torch.long, device=device), torch.ones(1, device=device)


def build_source(
    cfg: Config, models: Predictors, book: PromptTable, world: World, pool: LatentPool | None
) -> RetainSource:
    """The source that ``retain.source`` names; ``pool``: its pictures, where they are there already."""
    layout = BatchLayout(world.rank, world.world_size, cfg.retain.batch_size, cfg.train.gradient_accumulation_steps)
    if cfg.retain_source != "prompts":
        if pool is None:
            texts = anchor_prompts(book) if cfg.retain_source == "anchors" else book.retained
            pool = generate_pool(cfg, models, book, texts)
        return PoolSource(cfg, models, book, layout, pool)
    variants = [[PromptPair(prompt, UNCONDITIONAL) for prompt in book.retained]] * len(book.variants)
    kept = PromptTable(variants, [[]] * len(book.variants))
    kept.rows = book.rows  # the embedding table is that of the whole run
    sampler = cfg.sampler
    # Another seed than the unlearning trajectories', so that the two do not start from the same noise.
    return TrajectorySource(
        Rollout(
            models, kept, layout, steps=sampler.num_inference_steps, guidance_scale=sampler.guidance_scale,
            seed=cfg.seed + 1, sampler=sampler.name,
        )
    )  # fmt: skip


def anchor_prompts(book: PromptTable) -> list[str]:
    """Every prompt that asks for the same picture without a concept, once."""
    anchors = [variant.anchor for variants in book.variants for variant in variants if variant.anchor]
    return list(dict.fromkeys(anchors))


@torch.no_grad()
def generate_pool(
    cfg: Config, models: Predictors, book: PromptTable, prompts: Sequence[str], name: str = "pool", count: int = 0
) -> LatentPool:
    """Latents that the frozen model draws for the prompts; no VAE is involved. Prompts take turns in a
    shuffled order, each as often as the others.

    ``name``: of another pool of the same run, whose noise is its own; ``count``: other than ``retain.num_images``.
    """
    retain, backbone = cfg.retain, models.backbone
    count = count or retain.num_images
    order = random.Random(f"{cfg.seed}:{name}")
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += order.sample(list(prompts), len(prompts))
    chosen = chosen[:count]
    process = backbone.noise
    times = process.timesteps(retain.num_inference_steps)
    drawn = []
    seeds = [order.getrandbits(63) for _ in chosen]
    for first in range(0, len(chosen), retain.batch_size):
        names = chosen[first : first + retain.batch_size]
        cond = backbone.embeds.select([book.rows[name] for name in names])
        uncond = backbone.embeds.select([book.rows[UNCONDITIONAL]] * len(names))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[first : first + retain.batch_size]]
        latents = torch.stack([torch.randn(backbone.sample_shape, generator=g) for g in generators])
        latents = latents.to(cond.hidden.device)
        for time in times:
            timesteps = process.expand(time, len(latents))
            guided, unguided = models.frozen(latents, timesteps, cond, uncond)
            latents = process.step(
                guided, unguided, latents, timesteps, len(times), retain.guidance_scale, cfg.sampler.name
            )
        drawn.append(latents)
    return LatentPool(torch.cat(drawn), chosen)


def folder_captions(cfg: Config) -> list[tuple[Path, str]]:
    """(image, caption) of ``retain.folder``, sorted by name.

    Raises:
        UserError: no folder, no image, an image without a caption, or a caption that names an erased concept.
    """
    if cfg.retain.folder is None:
        raise UserError("retain.folder: none given; retain.source 'folder' needs images with captions")
    pairs = read_captions(Path(cfg.retain.folder), "retain.folder")
    for image, caption in pairs:
        refuse_erased(cfg, f"retain.folder: {image.name}", [caption])
    return pairs


def read_captions(folder: Path, field: str) -> list[tuple[Path, str]]:
    """(image, caption) of a folder, sorted by name. ``field``: what errors call it.

    Raises:
        UserError: no folder, no image, or an image without a caption.
    """
    if not folder.is_dir():
        raise UserError(f"{field}: {folder} is not a folder")
    listed: dict[str, str] = {}
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        try:
            rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
            listed = {row["file_name"]: row["text"] for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{field}: {metadata} needs file_name and text in every line") from error
    pairs = []
    for image in sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES):
        text = image.with_suffix(".txt")
        caption = listed.get(image.name) or (text.read_text(encoding="utf-8").strip() if text.is_file() else "")
        if not caption:
            raise UserError(f"{field}: {image.name} has no caption; add it to metadata.jsonl or {text.name}")
        pairs.append((image, caption))
    if not pairs:
        raise UserError(f"{field}: {folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return pairs


def encode_folder(cfg: Config, pipeline: Pipeline, device: torch.device) -> LatentPool:
    """The images of ``retain.folder`` as latents."""
    return encode_images(folder_captions(cfg), cfg, pipeline, device, "retain.folder")


@torch.no_grad()
def encode_images(
    pairs: Sequence[tuple[Path, str]], cfg: Config, pipeline: Pipeline, device: torch.device, field: str
) -> LatentPool:
    """Images as latents: scaled to the training size, centre-cropped, and encoded once."""
    pixels = cfg.train.resolution or pipeline.unet.config["sample_size"] * pipeline.vae_scale_factor
    vae = pipeline.vae.to(device)
    latents = []
    for path, _ in pairs:
        picture = _square(path, pixels, field)
        values = torch.from_numpy(np.array(picture)).to(device, vae.dtype).permute(2, 0, 1)[None] / 127.5 - 1
        latents.append(vae.encode(values).latent_dist.mode() * vae.config["scaling_factor"])
    return LatentPool(torch.cat(latents).float(), [caption for _, caption in pairs])


def _square(path: Path, pixels: int, field: str) -> Image.Image:
    try:
        picture = Image.open(path).convert("RGB")
    except OSError as error:
        raise UserError(f"{field}: {path.name} cannot be read as an image") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    return picture.resize((pixels, pixels), Image.Resampling.LANCZOS, box=box)
