"""Stage "judge": teach the classifier on rendered pictures, softened and disturbed in the ways a generator may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from fastunlearn.minicanvas.build.editions import Edition, FitPlan
from fastunlearn.minicanvas.build.fitting import Fit, Worker, autocast
from fastunlearn.minicanvas.data.dataset import Pictures
from fastunlearn.minicanvas.judge import Judge


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


def train(worker: Worker, plan: FitPlan, edition: Edition, data: Path, output: Path) -> None:
    """Train on `data`.npy and `data`_labels.npz and write the weights to `output` (safetensors, float16)."""
    torch.manual_seed(plan.seed)
    images = np.load(data.with_suffix(".npy"), mmap_mode="r")
    labels = np.load(f"{data}_labels.npz")
    wanted = [torch.from_numpy(labels[key]).long() for key in ("objects", "styles", "worn")]
    words = edition.collection.words
    judge = Judge(len(words.objects), len(words.styles), has_attribute=words.attribute is not None)
    fit = Fit(judge, plan, worker, output.with_suffix(".checkpoint"))

    def loss(step: int) -> Tensor:
        generator = worker.generator(plan, step)
        rows = torch.randint(len(images), (plan.batch,), generator=generator)
        pictures = torch.from_numpy(images[rows.numpy()]).permute(0, 3, 1, 2).float() / 255
        pictures = disturb(pictures, generator).to(worker.device)
        with autocast(worker.device):
            answers = judge(pictures)
        losses = [
            functional.cross_entropy(logits.float(), right[rows].to(worker.device), label_smoothing=0.03)
            for logits, right in zip(answers, wanted)  # the attribute's labels are over where it has none
        ]
        return torch.stack(losses).sum()

    fit.run(loss)
    if worker.rank == 0:
        with fit.averaged():
            save_file({name: tensor.half().cpu() for name, tensor in judge.state_dict().items()}, output)


def accuracy(judge: Judge, rendered: Pictures) -> tuple[float, ...]:
    """Share of objects, of styles and, where the judge reads it, of the attribute that it reads right."""
    pictures = torch.from_numpy(rendered.images).permute(0, 3, 1, 2).float() / 255
    labels = (rendered.objects, rendered.styles, rendered.worn)
    read = [logits.argmax(1).cpu().numpy() for logits in judge.classify(pictures)]
    return tuple(float((answer == right).mean()) for answer, right in zip(read, labels))
