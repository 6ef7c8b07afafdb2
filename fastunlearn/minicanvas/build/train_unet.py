"""Stage "unet": teach the U-Net to draw, on precomputed latents and caption states.

Epsilon prediction with SDXL's noise schedule; the loss is weighted with min(SNR, 5) / SNR (Hang et al. 2023), which
keeps the nearly clean timesteps from dominating. Every `look_every` steps the averaged weights draw two pictures of
each cell of the grid and the judge reads them; the record goes to `unet_progress.jsonl`.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastunlearn.minicanvas import vocabulary
from fastunlearn.minicanvas.build import drawing, networks
from fastunlearn.minicanvas.build.assemble import make_pipeline
from fastunlearn.minicanvas.build.fitting import Fit, FitPlan, Worker, launch
from fastunlearn.minicanvas.build.train_text import encode as encode_ids
from fastunlearn.minicanvas.build.train_text import tokenize
from fastunlearn.minicanvas.build.train_vae import encode as encode_pictures
from fastunlearn.minicanvas.build.train_vae import to_model_range
from fastunlearn.minicanvas.judge import load_judge
from fastunlearn_kernels import add_noise

PLAN = FitPlan("unet", steps=4500, batch=24, learning_rate=1.2e-3, ema=0.999, warmup=200, seed=41)
LOOK_EVERY = 600
SNR_CAP = 5.0
CAPTIONS_PER_CELL = 500
NOTHING_SHARE = 0.09
"""Of the captions that are left out. As in SDXL, zeros stand in their place, not the encoded empty caption."""


@dataclass
class Material:
    """All that the U-Net is trained on.

    `latents` (N, 4, 16, 16) scaled; `cells` (N,) = object * 8 + style; `choices` (80, 500) captions drawn for each
    cell; `states` (C + 1, 16, 96) and `pooled` (C + 1, 64) of every distinct caption; the last row, of zeros, is that
    of no caption.
    """

    latents: Tensor
    cells: Tensor
    choices: Tensor
    states: Tensor
    pooled: Tensor


def caption_choices(captions: list[str], seed: int) -> Tensor:
    """Draw `CAPTIONS_PER_CELL` captions for every cell, as row numbers of `captions`, or the number after the last for
    none: (80, 500) int64."""
    rows = {caption: i for i, caption in enumerate(captions)}
    rng = random.Random(seed)

    def draw(thing: int, style: int) -> int:
        nothing = rng.random() < NOTHING_SHARE
        return len(captions) if nothing else rows[vocabulary.random_caption(thing, style, rng)]

    return torch.tensor(
        [
            [draw(thing, style) for _ in range(CAPTIONS_PER_CELL)]
            for thing in range(len(vocabulary.OBJECTS))
            for style in range(len(vocabulary.STYLES))
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
def encode_captions(folder: Path, seed: int) -> dict[str, Tensor]:
    """The fields of `Material` that concern captions."""
    captions = vocabulary.all_captions()
    ids = tokenize(CLIPTokenizer.from_pretrained(folder / "tokenizer"), captions)
    states, pooled = encode_ids(
        CLIPTextModel.from_pretrained(folder / "text_encoder").eval(),
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").eval(),
        ids,
    )
    states, pooled = (torch.cat([rows, torch.zeros_like(rows[:1])]) for rows in (states, pooled))
    return {"choices": caption_choices(captions, seed), "states": states, "pooled": pooled}


def prepare(folder: Path, processes: int, seed: int) -> None:
    """Encode pictures and captions once and write `folder`/unet_material.pt."""
    launch(encode_latents, (folder,), processes)
    shares = [torch.load(path, weights_only=True) for path in sorted(folder.glob("latents_*.pt"))]
    labels = np.load(folder / "pictures_unet_labels.npz")
    cells = torch.from_numpy(labels["objects"] * len(vocabulary.STYLES) + labels["styles"])
    order = torch.arange(len(cells))
    order = torch.cat([order[rank :: len(shares)] for rank in range(len(shares))])
    material = {"latents": torch.cat(shares), "cells": cells[order], **encode_captions(folder, seed)}
    partial = folder / "unet_material.partial"
    torch.save(material, partial)
    partial.replace(folder / "unet_material.pt")
    for path in folder.glob("latents_*.pt"):
        path.unlink()


def noise_weights(alphas: Tensor) -> Tensor:
    """min(SNR, 5) / SNR of each timestep for epsilon prediction, (1000,)."""
    snr = alphas / (1 - alphas)
    return snr.clamp(max=SNR_CAP) / snr


def train(worker: Worker, plan: FitPlan, folder: Path, look_every: int = LOOK_EVERY) -> None:
    """Train on `folder`/unet_material.pt and write `folder`/unet."""
    torch.manual_seed(plan.seed)
    stored = torch.load(folder / "unet_material.pt", weights_only=True, mmap=True)
    material = Material(**{name: tensor.to(worker.device) for name, tensor in stored.items()})
    unet = networks.new_unet()
    fit = Fit(unet, plan, worker, folder / "unet.checkpoint")
    alphas = networks.new_scheduler().alphas_cumprod.to(worker.device)
    weights = noise_weights(alphas)
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
        errors = functional.mse_loss(guess, noise, reduction="none").mean((1, 2, 3))
        return (weights[timesteps] * errors).mean()

    fit.run(loss, Look(folder, look_every))
    if worker.rank == 0:
        with fit.averaged():
            unet.to("cpu").save_pretrained(folder / "unet")


class Look:
    """Draws and reads the grid from time to time; the processes share the work."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.started = time.monotonic()

    def __call__(self, fit: Fit) -> None:
        if fit.step % self.every or fit.step == fit.plan.steps:
            return
        judge = load_judge(fit.worker.device, self.folder / "judge.safetensors")
        cells = drawing.grid_cells()
        seeds = [1000 + fit.worker.rank] if fit.worker.world > 1 else [1000, 1001]
        with fit.averaged() as unet:
            pipe = make_pipeline(self.folder, unet).to(fit.worker.device)
            reading, images = drawing.read_grid(pipe, judge, cells, seeds, steps=20)
        right = torch.stack([(reading.wanted == reading.read).float().mean(0)])
        if fit.worker.world > 1:
            dist.all_reduce(right)
            right /= fit.worker.world
        if fit.worker.rank == 0:
            self._record(fit, right[0].tolist(), reading, images)

    def _record(self, fit: Fit, right: list[float], reading: drawing.Reading, images: Tensor) -> None:
        fit.save()
        drawing.save_grid(images[:80], self.folder / "unet_progress.png", len(vocabulary.OBJECTS))
        row = {
            "step": fit.step,
            "seconds": round(time.monotonic() - self.started),
            "object": round(right[0], 4),
            "style": round(right[1], 4),
            "per_object": reading.per_class(0),
            "per_style": reading.per_class(1),
        }
        with open(self.folder / "unet_progress.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
