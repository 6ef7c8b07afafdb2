"""On-policy trajectories: b denoising trajectories per micro-batch, walked in lockstep with the model being edited.

What this is: the latents at which a run trains, how they get there, and what must be saved to resume them exactly.
What this is not: a loss. A trajectory carries no gradient.

Every trajectory has a number that does not depend on how it is spread over ranks and micro-batches, and its noise and
prompt are drawn from (seed, update, number) alone: the same global batch gives the same trajectories on any world size.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.models.backbone import PromptEmbeds
from fastunlearn.prompts.variants import UNCONDITIONAL, PromptPair, PromptTable
from fastunlearn.sampling.batch import Augmentation, BatchLayout, GuidedPrediction, UnlearnBatch
from fastunlearn.sampling.key_steps import KeyStep


class Rollout:
    """The trajectories of one rank. ``step`` is the key step at which they stand."""

    def __init__(
        self,
        models: Predictors,
        book: PromptTable,
        layout: BatchLayout,
        *,
        steps: int,
        guidance_scale: float,
        seed: int,
        sampler: str = "ddim",
    ) -> None:
        self.models = models
        self.book = book
        self.layout = layout
        self.guidance_scale = guidance_scale
        self.seed = seed
        self.noise = models.noise
        self.timesteps = self.noise.timesteps(steps)
        self.sampler = sampler
        self.latents = torch.empty(0)
        self.variants: list[PromptPair] = []

    def restart(self, step: KeyStep) -> None:
        """Bring fresh trajectories from pure noise to ``step.index`` with the guided student."""
        numbers = self.layout.global_sample_ids()
        options = self.book.variants[step.concept]
        self.variants = [options[self._draw(step.update, number) % len(options)] for number in numbers]
        self.latents = (
            torch.stack([self._initial_noise(step.update, number) for number in numbers]) * self.noise.init_noise_sigma
        )
        self.latents = self.latents.to(self.models.backbone.embeds.hidden.device)
        for index in range(step.index):
            self.walk(index)

    def windows(self, step: KeyStep, augmentation: Augmentation | None) -> Iterator[UnlearnBatch]:
        """This update's micro-batches. ``augmentation`` replaces the trained condition in the tail of a run."""
        uncond = self._embeds([UNCONDITIONAL] * self.layout.batch)
        numbers = self.layout.global_sample_ids()
        for micro, (latents, group) in enumerate(
            zip(self.latents.split(self.layout.batch), self._groups(), strict=True)
        ):
            cond = self._embeds([variant.prompt for variant in group])
            mine = numbers[micro * self.layout.batch : (micro + 1) * self.layout.batch]
            yield UnlearnBatch(
                latents=latents,
                timesteps=self.noise.expand(self.timesteps[step.index], len(latents)),
                cond=cond,
                trained=cond if augmentation is None else self.augmented(step, augmentation, mine),
                anchor=self._embeds([variant.anchor for variant in group]),
                uncond=uncond,
                augmented=augmentation is not None,
                advance=step.continues,
            )

    def advance(self, step: KeyStep, pairs: list[GuidedPrediction]) -> None:
        """One guided sampler step from predictions that training already made: the weights are one update stale."""
        self._advance(step.index, pairs)

    def walk(self, index: int) -> None:
        """One guided sampler step from ``index`` with predictions made for it."""
        uncond = self._embeds([UNCONDITIONAL] * self.layout.batch)
        groups = zip(self.latents.split(self.layout.batch), self._groups(), strict=True)
        pairs = []
        for latents, group in groups:
            cond = self._embeds([variant.prompt for variant in group])
            timesteps = self.noise.expand(self.timesteps[index], len(latents))
            pairs.append(GuidedPrediction(*self.models.rollout(latents, timesteps, cond, uncond)))
        self._advance(index, pairs)

    def state_dict(self) -> dict:
        """What a checkpoint needs besides the key-step position."""
        return {
            "latents": self.latents.cpu(),
            "prompts": [variant.prompt for variant in self.variants],
            "anchors": [variant.anchor for variant in self.variants],
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue the saved trajectories."""
        self.latents = state["latents"].to(self.models.backbone.embeds.hidden.device)
        self.variants = [PromptPair(p, a) for p, a in zip(state["prompts"], state["anchors"], strict=True)]

    def _advance(self, index: int, pairs: list[GuidedPrediction]) -> None:
        """One sampler step from this index, with the guided prediction."""
        groups = zip(self.latents.split(self.layout.batch), pairs, strict=True)
        self.latents = torch.cat([self._stepped(index, latents, pair) for latents, pair in groups])

    def _stepped(self, index: int, latents: Tensor, pair: GuidedPrediction) -> Tensor:
        timesteps = self.noise.expand(self.timesteps[index], len(latents))
        cond, uncond = pair.cond.detach(), pair.uncond.detach()
        return self.noise.step(cond, uncond, latents, timesteps, len(self.timesteps), self.guidance_scale, self.sampler)

    def augmented(self, step: KeyStep, augmentation: Augmentation, numbers: list[int]) -> PromptEmbeds:
        """Perturbed conditions for trajectories with these numbers."""
        pool = self.book.augmented[step.concept]
        clean = self._embeds([pool[self._draw(step.update, number) % len(pool)] for number in numbers])
        noise = torch.stack(
            [torch.randn(clean.hidden.shape[1:], generator=self._generator(step.update, n, 1)) for n in numbers]
        )
        return PromptEmbeds(clean.hidden + augmentation.noise * noise.to(clean.hidden), clean.pooled)

    def _groups(self) -> list[list[PromptPair]]:
        size = self.layout.batch
        return [self.variants[i : i + size] for i in range(0, len(self.variants), size)]

    def _embeds(self, prompts: list[str]) -> PromptEmbeds:
        return self.models.backbone.embeds.select([self.book.rows[prompt] for prompt in prompts])

    def _initial_noise(self, update: int, number: int) -> Tensor:
        shape = self.models.backbone.sample_shape
        return torch.randn(shape, generator=self._generator(update, number, 0))

    def _draw(self, update: int, number: int) -> int:
        return random.Random(f"{self.seed}:{update}:{number}").getrandbits(32)

    def _generator(self, update: int, number: int, stream: int) -> torch.Generator:
        seed = random.Random(f"{self.seed}:{update}:{number}:{stream}").getrandbits(63)
        return torch.Generator().manual_seed(seed)
