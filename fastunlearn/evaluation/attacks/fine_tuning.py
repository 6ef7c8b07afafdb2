"""The attacker's loop: a plain fine-tune on a pool of pictures, and how well a model denoises held-out ones.

Any code can use `attack_steps` on any U-Net that a ``Backbone`` can call; `edit` says what an attack may change and
undoes it afterwards. There is no VAE in the loop.

    with edit(settings, backbone, rows, seed) as change:
        for step, loss in zip(range(1, 101), attack_steps(backbone, pool, change, options, seed)): ...

Everything random is drawn from (seed, step, sample number): the same seed gives the same weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import nn

from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.evaluation.attacks.base import Attack, Edit, Embed, Target
from fastunlearn.evaluation.attacks.settings import Settings
from fastunlearn.models.backbone import Backbone
from fastunlearn.models.loading import Pipeline
from fastunlearn.prompts.variants import UNCONDITIONAL
from fastunlearn.registry import ATTACKS
from fastunlearn.sampling.image_pool import LatentPool
from fastunlearn.sampling.retain import RetainBatch, retain_loss


@dataclass(frozen=True)
class Options:
    """The attacker's optimizer (AdamW, torch's defaults otherwise)."""

    learning_rate: float
    batch_size: int = 8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    caption_dropout: float = 0.0


def attack_steps(backbone: Backbone, pool: LatentPool, change: Edit, options: Options, seed: int) -> Iterator[float]:
    """Fine-tune in place, one step per value taken; the value is the loss before the step. Never ends by itself.

    The loss is the mean squared error of what the model predicts (noise or velocity), timesteps are uniform, pictures
    go round in shuffled epochs. After each step no gradient is left.
    """
    models = Predictors(backbone, backbone.unet, backbone.unet, backbone.unet)
    optimizer = torch.optim.AdamW(change.parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    rows = _epochs(len(pool.prompts), seed)
    for step in count():
        batch = _batch(backbone, pool, change.embed, list(islice(rows, options.batch_size)), options, f"{seed}:{step}")
        loss = retain_loss(models, batch, "noise")
        loss.backward()
        if options.max_grad_norm:
            nn.utils.clip_grad_norm_(change.parameters, options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@torch.no_grad()
def denoising_error(backbone: Backbone, pool: LatentPool, embed: Embed, batch_size: int = 16) -> float:
    """Mean squared error of the predictions on these pictures: timesteps spread evenly, always the same noise."""
    models = Predictors(backbone, backbone.unet, backbone.unet, backbone.unet)
    pictures, timesteps = len(pool.prompts), len(backbone.noise)
    total = 0.0
    for first in range(0, pictures, batch_size):
        rows = list(range(first, min(first + batch_size, pictures)))
        times = [(2 * row + 1) * timesteps // (2 * pictures) for row in rows]
        draws = [random.Random(f"held-out:{row}") for row in rows]
        noisy = pool.noised(rows, times, draws, backbone.noise)
        cond = embed([pool.prompts[row] for row in rows])
        batch = RetainBatch(noisy.latents, noisy.timesteps, cond, noisy.clean, noisy.noise)
        total += retain_loss(models, batch, "noise").item() * len(rows)
    return total / pictures


def edit(
    settings: Settings,
    backbone: Backbone,
    rows: Mapping[str, int],
    seed: int,
    pipeline: Pipeline | None = None,
    words: Sequence[str] = (),
) -> AbstractContextManager[Edit]:
    """What the attack of the settings changes, until the block ends; then the model is as before.

    Args:
        rows: prompt -> row of ``backbone.embeds``; the empty prompt is among them.
        pipeline, words: text encoders and the concept's words, for attacks that learn words.
    """
    target = Target(settings, backbone, table(backbone, rows), seed, pipeline, words)
    attack: Attack = ATTACKS[settings.attack]
    return attack.edit(target)


def table(backbone: Backbone, rows: Mapping[str, int]) -> Embed:
    """Prompts are looked up in the embeddings that the run was prepared with."""
    return lambda prompts: backbone.embeds.select([rows[prompt] for prompt in prompts])


def _batch(
    backbone: Backbone, pool: LatentPool, embed: Embed, rows: Sequence[int], options: Options, key: str
) -> RetainBatch:
    draws = [random.Random(f"{key}:{place}") for place in range(len(rows))]
    times = [draw.randrange(len(backbone.noise)) for draw in draws]
    noisy = pool.noised(rows, times, draws, backbone.noise)
    dropped = [draw.random() < options.caption_dropout for draw in draws]
    texts = [UNCONDITIONAL if drop else pool.prompts[row] for row, drop in zip(rows, dropped, strict=True)]
    return RetainBatch(noisy.latents, noisy.timesteps, embed(texts), noisy.clean, noisy.noise)


def _epochs(pictures: int, seed: int) -> Iterator[int]:
    """Picture numbers without end, each once before any comes again."""
    for epoch in count():
        yield from random.Random(f"{seed}:epoch:{epoch}").sample(range(pictures), pictures)


def check_finite(loss: float, step: int, rate: float) -> None:
    """Raises ArithmeticError where an attack has diverged."""
    if not math.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss} at attack step {step}; lower --learning_rate ({rate:g})")
