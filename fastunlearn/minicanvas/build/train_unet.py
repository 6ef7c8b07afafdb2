"""Stage "unet": teach the U-Net to draw, on precomputed latents and caption states.

SDXL's noise schedule; how much each of its timesteps counts: `noise_weights`. Every `look_every` steps the averaged
weights draw two pictures of each cell of the grid and the judge reads them; the record goes to `unet_progress.jsonl`.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastunlearn.minicanvas.build import drawing, networks
from fastunlearn.minicanvas.build.assemble import make_pipeline
from fastunlearn.minicanvas.build.editions import Edition, FitPlan
from fastunlearn.minicanvas.build.fitting import Fit, Worker, launch
from fastunlearn.minicanvas.build.train_text import encode as encode_ids
from fastunlearn.minicanvas.build.train_text import tokenize
from fastunlearn.minicanvas.build.train_vae import encode as encode_pictures
from fastunlearn.minicanvas.build.train_vae import to_model_range
from fastunlearn.minicanvas.judge import load_judge
from fastunlearn_kernels import add_noise

SNR_CAP = 5.0
CAPTIONS_PER_CELL = 500


@dataclass
class Material:
    """All that the U-Net is trained on.

    `latents` (N, 4, 16, 16) scaled; `cells` (N,) = look * styles + style; `choices` (looks * styles, 500) captions
    drawn for each cell; `states` (C + 1, 16, W1 + W2) and `pooled` (C + 1, W2) of every distinct caption; the last row,
    of zeros, is that of no caption.
    """

    latents: Tensor
    cells: Tensor
    choices: Tensor
    states: Tensor
    pooled: Tensor


def caption_choices(edition: Edition, captions: list[str], seed: int) -> Tensor:
    """Draw `CAPTIONS_PER_CELL` captions for every cell, as row numbers of `captions`, or the number after the last for
    none: (cells, 500) int64."""
    rows = {caption: i for i, caption in enumerate(captions)}
    rng = random.Random(seed)

    words = edition.collection.words

    def draw(thing: int, worn: bool, style: int) -> int:
        nothing = rng.random() < edition.nothing_share
        return len(captions) if nothing else rows[words.random_caption(thing, style, rng, worn)]

    return torch.tensor(
        [
            [draw(thing, worn, style) for _ in range(CAPTIONS_PER_CELL)]
            for thing, worn in edition.collection.looks
            for style in range(len(words.styles))
        ]
    )


@torch.no_grad()
def encode_latents(worker: Worker, folder: Path) -> None:
    """Encode this process's share of the pictures, scaled, to `folder`/latents_RANK.pt; shares are interleaved."""
    images = np.load(folder / "pictures_unet.npy", mmap_mode="r")
    vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).to(worker.device)
    block = 200 * worker.world
    parts = []
    for start in tqdm(range(worker.rank, len(images), block), desc="latents", disable=worker.rank > 0):
        mine = to_model_range(images[start : start + block : worker.world])
        parts.append(encode_pictures(vae, mine) * vae.config.scaling_factor)
    torch.save(torch.cat(parts), folder / f"latents_{worker.rank}.pt")


@torch.no_grad()
def encode_captions(folder: Path, edition: Edition) -> dict[str, Tensor]:
    """The fields of `Material` that concern captions."""
    captions = edition.collection.words.all_captions()
    ids = tokenize(CLIPTokenizer.from_pretrained(folder / "tokenizer"), captions)
    first = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").eval()
    parts = [encode_ids(first, second, some) for some in ids.split(2000)]
    states, pooled = (torch.cat([*rows, torch.zeros_like(rows[0][:1])]) for rows in zip(*parts))
    return {
        "choices": caption_choices(edition, captions, edition.plans["unet"].seed),
        "states": states,
        "pooled": pooled,
    }


def prepare(folder: Path, edition: Edition, processes: int) -> None:
    """Encode pictures and captions once and write `folder`/unet_material.pt."""
    launch(encode_latents, (folder,), processes)
    shares = [torch.load(path, weights_only=True) for path in sorted(folder.glob("latents_*.pt"))]
    labels = np.load(folder / "pictures_unet_labels.npz")
    numbers = {look: i for i, look in enumerate(edition.collection.looks)}
    looks = [numbers[int(thing), bool(worn)] for thing, worn in zip(labels["objects"], labels["worn"])]
    cells = torch.tensor(looks) * len(edition.collection.words.styles) + torch.from_numpy(labels["styles"])
    order = torch.arange(len(cells))
    order = torch.cat([order[rank :: len(shares)] for rank in range(len(shares))])
    material = {
        "latents": torch.cat(shares),
        "cells": cells[order],
        **encode_captions(folder, edition),
    }
    partial = folder / "unet_material.partial"
    torch.save(material, partial)
    partial.replace(folder / "unet_material.pt")
    for path in folder.glob("latents_*.pt"):
        path.unlink()


def noise_weights(alphas: Tensor, prediction_type: str) -> Tensor:
    """How much each timestep counts, (T,): what keeps the nearly clean ones from dominating (Hang et al. 2023).

    min(SNR, 5) / SNR for epsilon. An error in the velocity is one in the clean latents times SNR + 1, so there it is
    min(SNR + 1, 5) / (SNR + 1): 1 where nothing but noise is left, as with zero terminal SNR, and not 0 or infinite.
    Both are written in alpha-bar, SNR = alpha / (1 - alpha), so that nothing is divided by zero.
    """
    if prediction_type == "v_prediction":
        return (SNR_CAP * (1 - alphas)).clamp(max=1.0)
    return (SNR_CAP * (1 - alphas) / alphas).clamp(max=1.0)


def train(worker: Worker, plan: FitPlan, edition: Edition, folder: Path) -> None:
    """Train on `folder`/unet_material.pt and write `folder`/unet."""
    torch.manual_seed(plan.seed)
    stored = torch.load(folder / "unet_material.pt", weights_only=True, mmap=True)
    material = Material(**{name: tensor.to(worker.device) for name, tensor in stored.items()})
    unet = networks.new_unet(edition)
    fit = Fit(unet, plan, worker, folder / "unet.checkpoint")
    scheduler = networks.new_scheduler(edition)
    alphas, velocity = scheduler.alphas_cumprod.to(worker.device), scheduler.config.prediction_type == "v_prediction"
    weights = noise_weights(alphas, scheduler.config.prediction_type)
    time_ids = torch.tensor([networks.TIME_IDS], device=worker.device).expand(plan.batch, -1)

    def loss(step: int) -> Tensor:
        generator = worker.generator(plan, step)
        size = (plan.batch,)
        rows = torch.randint(len(material.latents), size, generator=generator)
        timesteps = torch.randint(len(alphas), size, generator=generator).to(worker.device)
        which = torch.randint(CAPTIONS_PER_CELL, size, generator=generator)
        latents = material.latents[rows]
        noise = torch.randn(latents.shape, generator=generator).to(worker.device)
        captions = material.choices[material.cells[rows], which]
        noisy = add_noise(latents, noise, timesteps, alphas)
        conditions = {"text_embeds": material.pooled[captions], "time_ids": time_ids}
        guess = unet(noisy, timesteps, material.states[captions], added_cond_kwargs=conditions).sample
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        errors = functional.mse_loss(guess, target, reduction="none").mean((1, 2, 3))
        return (weights[timesteps] * errors).mean()

    fit.run(loss, Look(folder, edition))
    if worker.rank == 0:
        with fit.averaged():
            unet.to("cpu").save_pretrained(folder / "unet")


class Look:
    """Draws and reads the grid from time to time; the processes share the work."""

    def __init__(self, folder: Path, edition: Edition) -> None:
        self.folder, self.edition = folder, edition
        self.started = time.monotonic()

    def __call__(self, fit: Fit) -> None:
        if fit.step % self.edition.look_every or fit.step == fit.plan.steps:
            return
        judge = load_judge(fit.worker.device, self.folder / "judge.safetensors")
        seeds = [1000 + fit.worker.rank] if fit.worker.world > 1 else [1000, 1001]
        with fit.averaged() as unet:
            pipe = make_pipeline(self.folder, unet, self.edition).to(fit.worker.device)
            reading, images = drawing.read_grid(pipe, judge, self.edition.cells, seeds, steps=20, edition=self.edition)
        right = torch.stack([(reading.wanted == reading.read).float().mean(0)])
        if fit.worker.world > 1:
            dist.all_reduce(right)
            right /= fit.worker.world
        if fit.worker.rank == 0:
            self._record(fit, right[0].tolist(), reading, images)

    def _record(self, fit: Fit, right: list[float], reading: drawing.Reading, images: Tensor) -> None:
        fit.save()
        columns = len(self.edition.collection.looks)
        drawing.save_grid(images[: len(self.edition.cells)], self.folder / "unet_progress.png", columns)
        row: dict[str, Any] = {"step": fit.step, "seconds": round(time.monotonic() - self.started)}
        row |= {kind: round(share, 4) for kind, share in zip(drawing.KINDS, right)}
        row |= {f"per_{kind}": reading.per_class(i) for i, kind in enumerate(drawing.KINDS[: len(right)])}
        with open(self.folder / "unet_progress.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
