"""The three sets of the meta term: pictures as latents, made by the original model or read from folders, cached once.

The pools, and the samples that an update draws from them: those that the simulated attack trains on, and those that are
asked before and after it. No VAE is in the loop. The losses are in ``objective.py``.

Everything random is drawn from (seed, update, sample number), so that the same global batch gives the same samples on
any world size.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.config.run_prompts import forbidden_anchors, meta_prompts, set_captions
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.models.loading import Pipeline
from fastunlearn.prompts.variants import UNCONDITIONAL, PromptTable
from fastunlearn.sampling.batch import BatchLayout
from fastunlearn.sampling.image_pool import LatentPool, encode_images, generate_pool
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.retain import RetainBatch
from fastunlearn.schema.meta import SETS, set_weights
from fastunlearn.utils.distributed import World


@dataclass
class QueryBatch:
    """The samples of the losses before and after the attack, all sets in one batch."""

    batch: RetainBatch
    set_B: Tensor
    """(B,) int64: which of ``schema.meta.SETS`` each sample belongs to."""
    anchor: PromptEmbeds
    """What each sample's prompt asks for once the concept is removed; only read on forbidden samples."""

    def without_forbidden(self) -> QueryBatch:
        """What must be kept."""
        chosen = self.set_B != SETS.index("forbidden")
        b = self.batch
        assert b.clean is not None and b.noise is not None
        kept = RetainBatch(
            b.latents[chosen], b.timesteps[chosen], b.cond.select(chosen), b.clean[chosen], b.noise[chosen]
        )
        return QueryBatch(kept, self.set_B[chosen], self.anchor.select(chosen))


class MetaSets:
    """Pools by set, and where each update's samples come from."""

    def __init__(
        self, cfg: Config, models: Predictors, prompt_table: PromptTable, world: World, pools: Mapping[str, LatentPool]
    ) -> None:
        self.cfg, self.models, self.prompt_table, self.pools = cfg, models, prompt_table, pools
        self._anchors = forbidden_anchors(cfg)
        meta = cfg.meta
        self._weights = set_weights(meta)
        self._query = BatchLayout(world.rank, world.world_size, meta.batch_size, 1)
        self._attack = BatchLayout(world.rank, world.world_size, meta.inner_batch_size, 1)
        variants = [{variant.prompt for variant in own} for own in prompt_table.variants]
        self._of_concept = [
            [row for row, prompt in enumerate(pools["forbidden"].prompts) if prompt in own] for own in variants
        ]

    def attack_batches(self, step: KeyStep) -> list[RetainBatch]:
        """One batch for each step of the simulated attack, from the first half of the concept's forbidden pictures."""
        batches = []
        for inner in range(self.cfg.meta.inner_steps):
            draws = self._draws(step, f"attack{inner}", self._attack)
            rows = [draw.choice(self._forbidden(step)[0]) for draw in draws]
            batches.append(self._batch("forbidden", rows, draws, None))
        return batches

    def query_batch(self, step: KeyStep, timestep: int) -> QueryBatch:
        """The samples of both losses: the attack has not seen the forbidden ones. ``timestep``: of the key step."""
        batches, sets, anchors = [], [], []
        fixed = timestep if self.cfg.meta.timesteps == "key" else None
        for number, name in enumerate(SETS):
            if name not in self.pools or not self._weights[name]:
                continue
            draws = self._draws(step, name, self._query)
            choice = self._forbidden(step)[1] if name == "forbidden" else range(len(self.pools[name].prompts))
            rows = [draw.choice(choice) for draw in draws]
            batches.append(self._batch(name, rows, draws, fixed))
            sets += [number] * len(rows)
            prompts = [self.pools[name].prompts[row] for row in rows]
            anchors += [self._anchors.get(prompt, UNCONDITIONAL) for prompt in prompts]
        device = batches[0].latents.device
        embeds = self.models.backbone.embeds.select([self.prompt_table.index[anchor] for anchor in anchors])
        return QueryBatch(_joined(batches), torch.tensor(sets, device=device), embeds)

    def _forbidden(self, step: KeyStep) -> tuple[Sequence[int], Sequence[int]]:
        """(the attack's half, that of the queries) of a concept's forbidden pictures; of all, where none is its own."""
        rows = self._of_concept[step.concept]
        if len(rows) < 2:
            rows = list(range(len(self.pools["forbidden"].prompts)))
        return rows[: len(rows) // 2], rows[len(rows) // 2 :]

    def _draws(self, step: KeyStep, what: str, layout: BatchLayout) -> list[random.Random]:
        numbers = layout.global_sample_ids()
        return [random.Random(f"{self.cfg.seed}:meta:{step.update}:{what}:{number}") for number in numbers]

    def _batch(
        self, name: str, rows: Sequence[int], draws: Sequence[random.Random], timestep: int | None
    ) -> RetainBatch:
        backbone, pool = self.models.backbone, self.pools[name]
        times = [draw.randrange(len(backbone.noise)) if timestep is None else timestep for draw in draws]
        cond = backbone.embeds.select([self.prompt_table.index[pool.prompts[row]] for row in rows])
        noisy = pool.noised(rows, times, draws, backbone.noise)
        return RetainBatch(noisy.latents, noisy.timesteps, cond, noisy.clean, noisy.noise)


def draw_sets(
    cfg: Config, models: Predictors, prompt_table: PromptTable, folders: Mapping[str, LatentPool] | None = None
) -> dict[str, LatentPool]:
    """The pictures of each set: those of ``folders``, and for the others what the original model draws."""
    drawn = {
        name: generate_pool(cfg, models, prompt_table, prompts, f"meta-{name}", cfg.meta.num_images)
        for name, prompts in meta_prompts(cfg).items()
    }
    return {**drawn, **(folders or {})}


def encode_sets(cfg: Config, pipeline: Pipeline, device: torch.device) -> dict[str, LatentPool]:
    """The sets that are folders of images, as latents, encoded once."""
    return {
        name: encode_images(captions, cfg, pipeline, device, f"meta.{name}_folder")
        for name, captions in set_captions(cfg).items()
    }


def _joined(batches: Sequence[RetainBatch]) -> RetainBatch:
    return RetainBatch(
        torch.cat([batch.latents for batch in batches]),
        torch.cat([batch.timesteps for batch in batches]),
        PromptEmbeds.cat([batch.cond for batch in batches]),
        torch.cat([batch.clean for batch in batches if batch.clean is not None]),
        torch.cat([batch.noise for batch in batches if batch.noise is not None]),
    )
