"""On-policy trajectories: b denoising trajectories per micro-batch, walked in lockstep with the model being edited.

Here are the latents at which a run trains, how they get there, and what must be saved to resume them exactly. A
trajectory carries no gradient.

Every trajectory has a sample id that does not depend on how it is spread over ranks and micro-batches, and its noise
and prompt are drawn from (seed, update, sample id) alone, so that the same global batch gives the same trajectories
on any world size.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.prompts.variants import UNCONDITIONAL, PromptPair, PromptTable
from fastunlearn.sampling.base import BatchSampler
from fastunlearn.sampling.batch import Augmentation, BatchLayout, GuidedPrediction, UnlearnBatch
from fastunlearn.sampling.key_steps import KeyStep

INITIAL_NOISE, EMBEDDING_NOISE = 0, 1  # streams of a sample's generator


class Rollout(BatchSampler):
    """The trajectories of one rank. A ``step`` is the key step at which they stand."""

    def __init__(
        self,
        models: Predictors,
        prompt_table: PromptTable,
        layout: BatchLayout,
        *,
        steps: int,
        guidance_scale: float,
        seed: int,
        sampler: str = "ddim",
    ) -> None:
        self.models = models
        self.prompt_table = prompt_table
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
        samples, options = self.layout.global_sample_ids(), self.prompt_table.variants[step.concept]
        self.variants = [options[draw_choice(self.seed, step.update, sample) % len(options)] for sample in samples]
        initial = torch.stack([self._initial_noise(step.update, sample) for sample in samples])
        self.latents = (initial * self.noise.init_noise_sigma).to(self.noise.device)
        for index in range(step.index):
            self.sampler_step(index)

    def batches(self, step: KeyStep, augmentation: Augmentation | None) -> Iterator[UnlearnBatch]:
        """This update's micro-batches. ``augmentation`` replaces the trained condition in the tail of a run."""
        size, samples = self.layout.batch, self.layout.global_sample_ids()
        uncond = self._embeds([UNCONDITIONAL] * size)
        for micro, (latents, group) in enumerate(self._micro_batches()):
            cond = trained = self._embeds([variant.prompt for variant in group])
            if augmentation is not None:
                mine = samples[micro * size : (micro + 1) * size]
                embeds = self.models.backbone.embeds
                trained = augment_embeddings(embeds, self.prompt_table, step, augmentation, mine, self.seed)
            yield UnlearnBatch(
                latents=latents,
                timesteps=self.noise.expand(self.timesteps[step.index], len(latents)),
                cond=cond,
                trained=trained,
                anchor=self._embeds([variant.anchor for variant in group]),
                uncond=uncond,
                augmented=augmentation is not None,
                advance=step.continues,
                noise=self.noise.share(self.timesteps[step.index]),
            )

    def advance(self, step: KeyStep, predictions: list[GuidedPrediction]) -> None:
        """One guided sampler step from predictions that training already made: the weights are one update stale."""
        self._advance(step.index, predictions)

    def sampler_step(self, index: int) -> None:
        """One guided sampler step from ``index`` with predictions made for it."""
        uncond = self._embeds([UNCONDITIONAL] * self.layout.batch)
        predictions = []
        for latents, group in self._micro_batches():
            cond = self._embeds([variant.prompt for variant in group])
            timesteps = self.noise.expand(self.timesteps[index], len(latents))
            predictions.append(GuidedPrediction(*self.models.rollout(latents, timesteps, cond, uncond)))
        self._advance(index, predictions)

    def state_dict(self) -> dict:
        """What a checkpoint needs besides the key-step position."""
        return {
            "latents": self.latents.cpu(),
            "prompts": [variant.prompt for variant in self.variants],
            "anchors": [variant.anchor for variant in self.variants],
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue the saved trajectories."""
        self.latents = state["latents"].to(self.noise.device)
        self.variants = [PromptPair(p, a) for p, a in zip(state["prompts"], state["anchors"], strict=True)]

    def _advance(self, index: int, predictions: list[GuidedPrediction]) -> None:
        groups = zip(self.latents.split(self.layout.batch), predictions, strict=True)
        self.latents = torch.cat([self._stepped(index, latents, prediction) for latents, prediction in groups])

    def _stepped(self, index: int, latents: Tensor, prediction: GuidedPrediction) -> Tensor:
        timesteps = self.noise.expand(self.timesteps[index], len(latents))
        cond, uncond = prediction.cond.detach(), prediction.uncond.detach()
        return self.noise.step(cond, uncond, latents, timesteps, len(self.timesteps), self.guidance_scale, self.sampler)

    def _micro_batches(self) -> Iterator[tuple[Tensor, list[PromptPair]]]:
        size = self.layout.batch
        groups = [self.variants[i : i + size] for i in range(0, len(self.variants), size)]
        return zip(self.latents.split(size), groups, strict=True)

    def _embeds(self, prompts: list[str]) -> PromptEmbeds:
        return self.models.backbone.embeds.select([self.prompt_table.index[prompt] for prompt in prompts])

    def _initial_noise(self, update: int, sample: int) -> Tensor:
        generator = noise_generator(self.seed, update, sample, INITIAL_NOISE)
        return torch.randn(self.models.backbone.sample_shape, generator=generator)


def build_rollout(
    cfg: Config, models: Predictors, prompt_table: PromptTable, layout: BatchLayout, seed: int
) -> Rollout:
    """Trajectories as ``[sampler]`` says."""
    sampler = cfg.sampler
    return Rollout(
        models, prompt_table, layout, steps=sampler.num_inference_steps, guidance_scale=sampler.guidance_scale,
        seed=seed, sampler=sampler.name,
    )  # fmt: skip


def draw_choice(seed: int, update: int, sample: int) -> int:
    """A number that picks one of several prompts, modulo their count."""
    return random.Random(f"{seed}:{update}:{sample}").getrandbits(32)


def noise_generator(seed: int, update: int, sample: int, stream: int) -> torch.Generator:
    """The generator, on the CPU, of one stream of noise."""
    return torch.Generator().manual_seed(random.Random(f"{seed}:{update}:{sample}:{stream}").getrandbits(63))


def augment_embeddings(
    embeds: PromptEmbeds,
    prompts: PromptTable,
    step: KeyStep,
    augmentation: Augmentation,
    samples: Sequence[int],
    seed: int,
) -> PromptEmbeds:
    """KSCU's tail: a perturbed prompt of the step's concept for each of the samples, with noise on its embedding.

    ``embeds``: of all prompts of the table.
    """
    pool = prompts.augmented[step.concept]
    chosen = [pool[draw_choice(seed, step.update, sample) % len(pool)] for sample in samples]
    clean = embeds.select([prompts.index[prompt] for prompt in chosen])
    generators = [noise_generator(seed, step.update, sample, EMBEDDING_NOISE) for sample in samples]
    noise = torch.stack([torch.randn(clean.hidden.shape[1:], generator=generator) for generator in generators])
    return PromptEmbeds(clean.hidden + augmentation.noise * noise.to(clean.hidden), clean.pooled)
