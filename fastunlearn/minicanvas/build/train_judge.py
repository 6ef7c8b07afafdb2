"""Stage "judge": teach the classifier on rendered pictures, softened and disturbed in the ways a generator may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from fastunlearn.minicanvas.build.fitting import Fit, FitPlan, Worker, autocast
from fastunlearn.minicanvas.judge import Judge

PLAN = FitPlan("judge", steps=2400, batch=32, learning_rate=2e-3, ema=0.998, weight_decay=0.02, seed=11)


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Soften, recolour slightly, shift and add noise to pictures (B, 3, 64, 64) in [0, 1]; each picture on its own."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=generator)

    soft = functional.interpolate(functional.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    smooth = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    weights = uniform(0, 1, 2, 1, 1, 1) * (uniform(0, 1, 2, 1, 1, 1) < 0.5)
    images = images + weights[:, 0] * (smooth - images)
    images = images + 0.9 * weights[:, 1] * (soft - images)
    images = (images - 0.5) * uniform(0.85, 1.15, 1, 1, 1) + 0.5 + uniform(-0.06, 0.06, 3, 1, 1)
    rough = torch.randn(len(images), 3, 16, 16, generator=generator)  # blotches as large as a latent pixel
    images = images + uniform(0, 0.05, 1, 1, 1) * functional.interpolate(rough, scale_factor=4, mode="bilinear")
    images = images + uniform(0, 0.05, 1, 1, 1) * torch.randn(images.shape, generator=generator)
    dy, dx = torch.randint(-3, 4, (2,), generator=generator).tolist()
    return images.roll((dy, dx), (2, 3)).clamp(0, 1)


def train(worker: Worker, plan: FitPlan, data: Path, output: Path) -> None:
    """Train on `data`.npy and `data`_labels.npz and write the weights to `output` (safetensors, float16)."""
    torch.manual_seed(plan.seed)
    images = np.load(data.with_suffix(".npy"), mmap_mode="r")
    labels = np.load(f"{data}_labels.npz")
    objects, styles = (torch.from_numpy(labels[key]) for key in ("objects", "styles"))
    judge = Judge()
    fit = Fit(judge, plan, worker, output.with_suffix(".checkpoint"))

    def loss(step: int) -> Tensor:
        generator = worker.generator(plan, step)
        rows = torch.randint(len(images), (plan.batch,), generator=generator)
        pictures = torch.from_numpy(images[rows.numpy()]).permute(0, 3, 1, 2).float() / 255
        pictures = disturb(pictures, generator).to(worker.device)
        with autocast(worker.device):
            object_logits, style_logits = judge(pictures)
        return functional.cross_entropy(
            object_logits.float(), objects[rows].to(worker.device), label_smoothing=0.03
        ) + functional.cross_entropy(style_logits.float(), styles[rows].to(worker.device), label_smoothing=0.03)

    fit.run(loss)
    if worker.rank == 0:
        with fit.averaged():
            save_file({name: tensor.half().cpu() for name, tensor in judge.state_dict().items()}, output)


def accuracy(judge: Judge, images: np.ndarray, objects: np.ndarray, styles: np.ndarray) -> tuple[float, float]:
    """Share of objects and of styles that the judge reads right in pictures (N, 64, 64, 3) uint8."""
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    object_logits, style_logits = judge.classify(pictures)
    read = (object_logits.argmax(1).cpu().numpy(), style_logits.argmax(1).cpu().numpy())
    return float((read[0] == objects).mean()), float((read[1] == styles).mean())
