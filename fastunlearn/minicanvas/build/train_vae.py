"""Stage "vae": teach the autoencoder to carry the rendered pictures through 4 x 16 x 16 latents.

Squared error with a little absolute error for edges, and a weight on the KL term so small that it only keeps the
latents near unit size. Other emoji are mixed in, so that it does not learn ten objects by heart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fastunlearn.minicanvas.build import networks
from fastunlearn.minicanvas.build.editions import FitPlan
from fastunlearn.minicanvas.build.fitting import Fit, Worker, autocast

KL_WEIGHT = 1e-4  # per latent element, against a mean squared error per pixel value


def to_model_range(images: np.ndarray) -> Tensor:
    """(N, 64, 64, 3) uint8 -> (N, 3, 64, 64) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def train(worker: Worker, plan: FitPlan, data: Path, output: Path, start: Path | None = None) -> None:
    """Train on the pictures of `data` (.npy, (N, 64, 64, 3) uint8) and write the autoencoder folder `output`.

    `start`: the autoencoder to go on from. Its encoder, and with it what a latent means, stays as it is.
    """
    torch.manual_seed(plan.seed)
    images = np.load(data, mmap_mode="r")
    if start is None:
        vae = networks.new_vae()
    else:
        vae = AutoencoderKL.from_pretrained(start, local_files_only=True)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    fit = Fit(vae, plan, worker, output.with_suffix(".checkpoint"))

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(images), (plan.batch,), generator=worker.generator(plan, step))
        pictures = to_model_range(images[rows.numpy()]).to(worker.device)
        with autocast(worker.device):
            latents = vae.encode(pictures).latent_dist
            restored = vae.decode(latents.sample()).sample.float()
        difference = restored - pictures
        kl = latents.kl().float().mean() / latents.mean[0].numel()
        return difference.square().mean() + 0.05 * difference.abs().mean() + KL_WEIGHT * kl

    fit.run(loss)
    if worker.rank == 0:
        with fit.averaged():
            if start is None:
                sample = to_model_range(images[:: max(1, len(images) // 1000)])
                vae.register_to_config(scaling_factor=round(1 / encode(vae, sample).std().item(), 4))
            vae.to("cpu").save_pretrained(output)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, batch: int = 100) -> Tensor:
    """The unscaled mean latents (N, 4, 16, 16), float32 on the CPU, of pictures (N, 3, 64, 64) in [-1, 1]."""
    return torch.cat([vae.encode(part.to(vae.device)).latent_dist.mean.cpu() for part in pictures.split(batch)])


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pictures: Tensor, batch: int = 100) -> Tensor:
    """Peak signal-to-noise ratio in dB of each reconstruction, (N,)."""
    errors = []
    for part in pictures.to(vae.device).split(batch):
        restored = vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1)
        errors.append(((restored - part) / 2).square().mean((1, 2, 3)).cpu())
    return -10 * torch.cat(errors).log10()
