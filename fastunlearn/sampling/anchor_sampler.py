"""Windows of a method that trains on noised pictures of the anchor instead of trajectories (DoCo).

What this is: pictures that the frozen model draws of each anchor prompt, as latents, and for each update a batch of
them, noised, with the prompt that asks for the concept instead.
What this is not: the loss (``methods/doco.py``).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from fastunlearn.config import Config, first_student_update
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.prompts.variants import UNCONDITIONAL, PromptTable
from fastunlearn.sampling.batch import Augmentation, BatchLayout, UnlearnBatch
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.retain import LatentPool
from fastunlearn.sampling.static_sampler import StaticSampler


class AnchorSampler(StaticSampler):
    """Every update draws anew from (seed, update, number)."""

    def __init__(
        self, cfg: Config, models: Predictors, book: PromptTable, layout: BatchLayout, pool: LatentPool
    ) -> None:
        self.cfg, self.models, self.book, self.layout, self.pool = cfg, models, book, layout, pool
        self.timesteps = models.noise.timesteps(cfg.sampler.num_inference_steps)
        self._prompts = [
            {anchor: [v.prompt for v in variants if v.anchor == anchor] for anchor in {v.anchor for v in variants}}
            for variants in book.variants
        ]
        self._rows = [[i for i, prompt in enumerate(pool.prompts) if prompt in known] for known in self._prompts]

    def windows(self, step: KeyStep, augmentation: Augmentation | None) -> Iterator[UnlearnBatch]:
        """This update's micro-batches."""
        numbers, size = self.layout.global_sample_ids(), self.layout.batch
        embeds, rows = self.models.backbone.embeds, self.book.rows
        process = self.models.noise
        for first in range(0, len(numbers), size):
            draws = [random.Random(f"{self.cfg.seed}:anchor:{step.update}:{n}") for n in numbers[first : first + size]]
            chosen = [draw.choice(self._rows[step.concept]) for draw in draws]
            anchors = [self.pool.prompts[row] for row in chosen]
            prompts = [draw.choice(self._prompts[step.concept][a]) for draw, a in zip(draws, anchors, strict=True)]
            times = [self._time(draw, step, len(process)) for draw in draws]
            noisy = self.pool.noised(chosen, times, draws, process)
            cond = embeds.select([rows[prompt] for prompt in prompts])
            yield UnlearnBatch(
                latents=noisy.latents,
                timesteps=noisy.timesteps,
                cond=cond,
                trained=cond,
                anchor=embeds.select([rows[anchor] for anchor in anchors]),
                uncond=embeds.select([rows[UNCONDITIONAL]] * len(draws)),
                augmented=False,
                advance=False,
                trains=step.update >= first_student_update(self.cfg),
            )

    def _time(self, draw: random.Random, step: KeyStep, count: int) -> int:
        """Uniform over the noise schedule from the smallest on, or over the sampler's steps from the key step on."""
        times = self.cfg.method_spec.anchor_timesteps(self.cfg)
        if times.uniform:
            return draw.randrange(min(times.minimum, count - 1), count)
        return draw.choice(self.timesteps[step.index :])
