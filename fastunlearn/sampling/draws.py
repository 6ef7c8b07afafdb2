"""What is drawn for one sample of an update: its prompt, its noise, its perturbed prompt.

Everything follows from (seed, update, sample id), and so not from how the global batch is spread over ranks and
micro-batches.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from fastunlearn.models.prompt_embeds import PromptEmbeds
from fastunlearn.prompts.variants import PromptTable
from fastunlearn.sampling.batch import Augmentation
from fastunlearn.sampling.key_steps import KeyStep

INITIAL_NOISE, EMBEDDING_NOISE = 0, 1  # streams of a sample's generator


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
