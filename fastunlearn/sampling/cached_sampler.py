"""Windows whose targets were made before training, which then needs no frozen model (``teacher.storage`` "cached").

What this is: trajectories that the original model walks once, with its predictions at the steps that the run will train
at, on the host; and for each update a batch drawn from them.
What this is not: on-policy. The student trains on the original's latents, not on its own as they change.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from fastunlearn.config import Config
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.prompts.variants import PromptTable
from fastunlearn.sampling.batch import Augmentation, BatchLayout, GuidedPrediction, UnlearnBatch
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.rollout import Rollout
from fastunlearn.sampling.static_sampler import StaticSampler


@dataclass(frozen=True)
class Target:
    """One trajectory of the original model at one step, on the host. All (C, H, W)."""

    prompt: str
    anchor_prompt: str
    latents: Tensor
    cond: Tensor
    anchor: Tensor
    uncond: Tensor


Targets = dict[tuple[int, int], list[Target]]
"""By concept and sampler index; as many for each index, and in the same order."""


def sample_targets(cfg: Config, models: Predictors, book: PromptTable, table: list[KeyStep], progress: bool) -> Targets:
    """Walk ``teacher.trajectories`` trajectories for each concept through the indices of the table. Every rank makes
    the same ones. Call it before the first update, while the student is the original."""
    found: Targets = {}
    batch, total = cfg.train.train_batch_size, cfg.teacher.trajectories
    for concept in range(len(book.variants)):
        wanted = sorted({step.index for step in table if step.concept == concept})
        if not wanted:
            continue  # another rank's concept
        starts = range(0, total, batch)
        for first in tqdm(starts, desc="targets", unit="batch", disable=not progress, leave=False):
            walker = _walker(cfg, models, book, min(batch, total - first))
            # Numbers below those of any update, so that no trajectory of a plain run is repeated.
            walker.restart(KeyStep(-1 - first, concept, wanted[0], restart=True, continues=False))
            for index in range(wanted[0], wanted[-1] + 1):
                if index in wanted:
                    found.setdefault((concept, index), []).extend(_targets_here(models, walker, index))
                elif index < wanted[-1]:
                    walker.walk(index)
    return found


def _walker(cfg: Config, models: Predictors, book: PromptTable, batch: int) -> Rollout:
    sampler = cfg.sampler
    return Rollout(
        models, book, BatchLayout(0, 1, batch, 1), steps=sampler.num_inference_steps,
        guidance_scale=sampler.guidance_scale, seed=cfg.seed, sampler=sampler.name,
    )  # fmt: skip


def _targets_here(models: Predictors, walker: Rollout, index: int) -> Iterator[Target]:
    """The predictions at this index; the walker goes on with two of them."""
    (window,) = walker.windows(KeyStep(0, 0, index, restart=False, continues=True), None)
    cond, anchor, uncond = models.frozen(window.latents, window.timesteps, window.cond, window.anchor, window.uncond)
    here = [tensor.cpu() for tensor in (window.latents, cond, anchor, uncond)]
    for variant, latents, *predictions in zip(walker.variants, *here, strict=True):
        yield Target(variant.prompt, variant.anchor, latents, *predictions)
    walker.advance(KeyStep(0, 0, index, restart=False, continues=True), [GuidedPrediction(cond, uncond)])


class CachedSampler(StaticSampler):
    """Every update draws from (seed, update, number)."""

    def __init__(
        self, cfg: Config, models: Predictors, book: PromptTable, layout: BatchLayout, targets: Targets
    ) -> None:
        self.models, self.book, self.layout, self.targets = models, book, layout, targets
        self.seed = cfg.seed
        self._prompts = _walker(cfg, models, book, layout.batch)
        self.timesteps = self._prompts.timesteps

    def windows(self, step: KeyStep, augmentation: Augmentation | None) -> Iterator[UnlearnBatch]:
        """This update's micro-batches."""
        known = self.targets[step.concept, step.index]
        numbers, size = self.layout.global_sample_ids(), self.layout.batch
        embeds, rows = self.models.backbone.embeds, self.book.rows
        place = embeds.hidden.device
        for first in range(0, len(numbers), size):
            mine = numbers[first : first + size]
            chosen = [random.Random(f"{self.seed}:cached:{step.update}:{n}").choice(known) for n in mine]
            latents, *targets = (
                torch.stack([getattr(target, name) for target in chosen]).to(place)
                for name in ("latents", "cond", "anchor", "uncond")
            )
            cond = embeds.select([rows[target.prompt] for target in chosen])
            yield UnlearnBatch(
                latents=latents,
                timesteps=self.models.noise.expand(self.timesteps[step.index], size),
                cond=cond,
                trained=cond if augmentation is None else self._prompts.augmented(step, augmentation, mine),
                anchor=embeds.select([rows[target.anchor_prompt] for target in chosen]),
                uncond=embeds.select([rows[""]] * size),
                augmented=augmentation is not None,
                advance=False,
                targets=dict(zip(("cond", "anchor", "uncond"), targets, strict=True)),
            )
