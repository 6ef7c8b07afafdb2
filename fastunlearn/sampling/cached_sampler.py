"""Batches whose targets were made before training, which then needs no frozen model (``teacher.storage`` "cached").

The original model walks trajectories once, and its predictions at the steps that the run will train at are stored on
the host; each update draws a batch from them. That is off-policy: the student trains on the original's latents, not on
its own as they change.
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
from fastunlearn.prompts.variants import UNCONDITIONAL, PromptTable
from fastunlearn.sampling.base import StaticSampler
from fastunlearn.sampling.batch import Augmentation, BatchLayout, GuidedPrediction, UnlearnBatch
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.rollout import Rollout, augment_embeddings, build_rollout


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


def sample_targets(
    cfg: Config, models: Predictors, prompt_table: PromptTable, table: list[KeyStep], progress: bool
) -> Targets:
    """Walk ``teacher.trajectories`` trajectories for each concept through the indices of the table. Every rank makes
    the same ones. Call it before the first update, while the student is the original."""
    found: Targets = {}
    batch, total = cfg.train.train_batch_size, cfg.teacher.trajectories
    for concept in range(len(prompt_table.variants)):
        wanted = sorted({step.index for step in table if step.concept == concept})
        if not wanted:
            continue  # another rank's concept
        starts = range(0, total, batch)
        for first in tqdm(starts, desc="targets", unit="batch", disable=not progress, leave=False):
            layout = BatchLayout(0, 1, min(batch, total - first), 1)
            walker = build_rollout(cfg, models, prompt_table, layout, cfg.seed)
            # Numbers below those of any update, so that no trajectory of a plain run is repeated.
            walker.restart(KeyStep(-1 - first, concept, wanted[0], restart=True, continues=False))
            for index in range(wanted[0], wanted[-1] + 1):
                if index in wanted:
                    found.setdefault((concept, index), []).extend(_targets_here(models, walker, index))
                elif index < wanted[-1]:
                    walker.sampler_step(index)
    return found


def _targets_here(models: Predictors, walker: Rollout, index: int) -> Iterator[Target]:
    """The predictions at this index; the walker continues with two of them."""
    (batch,) = walker.batches(KeyStep(0, 0, index, restart=False, continues=True), None)
    cond, anchor, uncond = models.frozen(batch.latents, batch.timesteps, batch.cond, batch.anchor, batch.uncond)
    here = [tensor.cpu() for tensor in (batch.latents, cond, anchor, uncond)]
    for variant, latents, *predictions in zip(walker.variants, *here, strict=True):
        yield Target(variant.prompt, variant.anchor, latents, *predictions)
    walker.advance(KeyStep(0, 0, index, restart=False, continues=True), [GuidedPrediction(cond, uncond)])


class CachedSampler(StaticSampler):
    """Every update draws from (seed, update, sample id)."""

    def __init__(
        self, cfg: Config, models: Predictors, prompt_table: PromptTable, layout: BatchLayout, targets: Targets
    ) -> None:
        self.models, self.prompt_table, self.layout, self.targets = models, prompt_table, layout, targets
        self.seed = cfg.seed
        self.timesteps = models.noise.timesteps(cfg.sampler.num_inference_steps)

    def batches(self, step: KeyStep, augmentation: Augmentation | None) -> Iterator[UnlearnBatch]:
        """This update's micro-batches."""
        known = self.targets[step.concept, step.index]
        samples, size = self.layout.global_sample_ids(), self.layout.batch
        for first in range(0, len(samples), size):
            mine = samples[first : first + size]
            chosen = [random.Random(f"{self.seed}:cached:{step.update}:{n}").choice(known) for n in mine]
            yield self._batch(step, augmentation, mine, chosen)

    def _batch(
        self, step: KeyStep, augmentation: Augmentation | None, samples: list[int], chosen: list[Target]
    ) -> UnlearnBatch:
        embeds, index, noise = self.models.backbone.embeds, self.prompt_table.index, self.models.noise
        latents, *targets = (
            torch.stack([getattr(target, name) for target in chosen]).to(noise.device)
            for name in ("latents", "cond", "anchor", "uncond")
        )
        cond = trained = embeds.select([index[target.prompt] for target in chosen])
        if augmentation is not None:
            trained = augment_embeddings(embeds, self.prompt_table, step, augmentation, samples, self.seed)
        return UnlearnBatch(
            latents=latents,
            timesteps=noise.expand(self.timesteps[step.index], len(samples)),
            cond=cond,
            trained=trained,
            anchor=embeds.select([index[target.anchor_prompt] for target in chosen]),
            uncond=embeds.select([index[UNCONDITIONAL]] * len(samples)),
            augmented=augmentation is not None,
            advance=False,
            noise=noise.share(self.timesteps[step.index]),
            targets=dict(zip(("cond", "anchor", "uncond"), targets, strict=True)),
        )
