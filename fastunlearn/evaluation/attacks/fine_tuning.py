"""The attacker: a plain fine-tune on a pool of pictures, and how well a model denoises held-out ones.

What this is: `attack_steps`, a generator that any code can use on any U-Net that a ``Backbone`` can call, and `edit`,
which says what an attack may change and undoes it afterwards.
What this is not: the schedule, the measurement or the seeds (``experiment.py``). There is no VAE in the loop.

    with edit(settings, backbone, rows, seed) as change:
        for step, loss in zip(range(1, 101), attack_steps(backbone, pool, change, options, seed)): ...

Everything random is drawn from (seed, step, sample number): the same seed gives the same weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import nn

from fastunlearn.denoisers.lora import low_rank
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.evaluation.attacks.textual_inversion import learned_words
from fastunlearn.evaluation.relearning.settings import Settings
from fastunlearn.models.backbone import Backbone
from fastunlearn.models.loading import Pipeline
from fastunlearn.models.parameter_names import set_trainable, trainable_names
from fastunlearn.models.prompt_embeds import PromptEmbeds
from fastunlearn.prompts.variants import UNCONDITIONAL
from fastunlearn.sampling.image_pool import LatentPool
from fastunlearn.sampling.retain import RetainBatch, retain_loss

Embed = Callable[[Sequence[str]], PromptEmbeds]


@dataclass(frozen=True)
class Edit:
    """What an attack trains, and how prompts are embedded while it does."""

    parameters: list[nn.Parameter]
    embed: Embed


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
    """What the attack changes, until the block ends; then the model is as before.

    Args:
        rows: prompt -> row of ``backbone.embeds``; the empty prompt is among them.
        pipeline, words: text encoders and the concept's words, for textual inversion.
    """
    embed = table(backbone, rows)
    if settings.attack == "textual-inversion":
        assert pipeline is not None
        return _words_changed(backbone, pipeline, words, embed)
    if settings.attack == "lora":
        return _low_rank_added(backbone, settings.lora_rank, seed, embed)
    return _weights_changed(backbone, attacked_names(backbone.unet, settings.attack), embed)


def attacked_names(unet: nn.Module, attack: str) -> list[str]:
    """The parameters that the attacks "full" and "attn" train."""
    if attack == "full":
        return trainable_names(unet, "full")
    return trainable_names(unet, "selfattn") + trainable_names(unet, "attn2")


def table(backbone: Backbone, rows: Mapping[str, int]) -> Embed:
    """Prompts are looked up in the embeddings that the run was prepared with."""
    return lambda prompts: backbone.embeds.select([rows[prompt] for prompt in prompts])


@contextmanager
def _weights_changed(backbone: Backbone, names: Sequence[str], embed: Embed) -> Iterator[Edit]:
    set_trainable(backbone.unet, names)
    parameters = [parameter for parameter in backbone.unet.parameters() if parameter.requires_grad]
    before = [parameter.detach().cpu().clone() for parameter in parameters]
    try:
        yield Edit(parameters, embed)
    finally:
        set_trainable(backbone.unet, [])
        for parameter, old in zip(parameters, before, strict=True):
            parameter.data.copy_(old)
            parameter.grad = None


@contextmanager
def _low_rank_added(backbone: Backbone, rank: int, seed: int, embed: Embed) -> Iterator[Edit]:
    set_trainable(backbone.unet, [])
    with low_rank(backbone.unet, rank, seed) as added:
        yield Edit([parameter for pair in added for parameter in pair.parameters()], embed)


@contextmanager
def _words_changed(backbone: Backbone, pipeline: Pipeline, words: Sequence[str], embed: Embed) -> Iterator[Edit]:
    set_trainable(backbone.unet, [])
    with learned_words(pipeline, words, backbone.embeds.hidden.device) as (vectors, encode):

        def learned(prompts: Sequence[str]) -> PromptEmbeds:
            parts = [embed([text]) if text == UNCONDITIONAL else encode(text) for text in prompts]
            like = backbone.embeds.hidden
            return PromptEmbeds.cat([part.to(like.device, like.dtype) for part in parts])

        yield Edit(vectors, learned)


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
