"""Batches of a method that trains on noised images of the anchor instead of trajectories (DoCo).

The frozen model draws images of each anchor prompt, as latents; each update takes some of them, noised, with the
prompt that asks for the concept instead.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from fastunlearn.config import Config, first_student_update
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.prompts.variants import UNCONDITIONAL, PromptTable
from fastunlearn.sampling.base import StaticSampler
from fastunlearn.sampling.batch import Augmentation, BatchLayout, UnlearnBatch
from fastunlearn.sampling.image_pool import LatentPool
from fastunlearn.sampling.key_steps import KeyStep


class AnchorSampler(StaticSampler):
    """Every update draws anew from (seed, update, sample id)."""

    def __init__(
        self, cfg: Config, models: Predictors, prompt_table: PromptTable, layout: BatchLayout, pool: LatentPool
    ) -> None:
        self.cfg, self.models, self.prompt_table, self.layout, self.pool = cfg, models, prompt_table, layout, pool
        self.timesteps = models.noise.timesteps(cfg.sampler.num_inference_steps)
        self._prompts = [
            {anchor: [v.prompt for v in variants if v.anchor == anchor] for anchor in {v.anchor for v in variants}}
            for variants in prompt_table.variants
        ]
        self._rows = [[i for i, prompt in enumerate(pool.prompts) if prompt in known] for known in self._prompts]

    def batches(self, step: KeyStep, augmentation: Augmentation | None) -> Iterator[UnlearnBatch]:
        """This update's micro-batches."""
        samples, size = self.layout.global_sample_ids(), self.layout.batch
        embeds, index, noise = self.models.backbone.embeds, self.prompt_table.index, self.models.noise
        for first in range(0, len(samples), size):
            mine = samples[first : first + size]
            rngs = [random.Random(f"{self.cfg.seed}:anchor:{step.update}:{sample}") for sample in mine]
            chosen = [rng.choice(self._rows[step.concept]) for rng in rngs]
            anchors = [self.pool.prompts[row] for row in chosen]
            prompts = [rng.choice(self._prompts[step.concept][a]) for rng, a in zip(rngs, anchors, strict=True)]
            times = [self._timestep(rng, step, len(noise)) for rng in rngs]
            noisy = self.pool.noised(chosen, times, rngs, noise)
            cond = embeds.select([index[prompt] for prompt in prompts])
            yield UnlearnBatch(
                latents=noisy.latents,
                timesteps=noisy.timesteps,
                cond=cond,
                trained=cond,
                anchor=embeds.select([index[anchor] for anchor in anchors]),
                uncond=embeds.select([index[UNCONDITIONAL]] * len(rngs)),
                augmented=False,
                advance=False,
                trains=step.update >= first_student_update(self.cfg),
            )

    def _timestep(self, rng: random.Random, step: KeyStep, count: int) -> int:
        """Uniform over the noise schedule from the smallest on, or over the sampler's steps from the key step on."""
        times = self.cfg.method_spec.anchor_timesteps(self.cfg)
        if times.uniform:
            return rng.randrange(min(times.minimum, count - 1), count)
        return rng.choice(self.timesteps[step.index :])
