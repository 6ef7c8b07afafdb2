"""What is drawn for a sample does not depend on who asks; what is only text is read without torch."""

from __future__ import annotations

import subprocess
import sys

import torch
from tiny import tiny_backbone, tiny_prompts

from fastunlearn.prompts.variants import PromptTable
from fastunlearn.sampling.batch import Augmentation
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.rollout import augment_embeddings, draw_choice, noise_generator

STEP = KeyStep(7, 0, 3, restart=False, continues=False)


def test_captions_batches_and_key_steps_need_no_torch() -> None:
    modules = "fastunlearn.config.run_prompts, fastunlearn.sampling.batch, fastunlearn.sampling.key_steps"
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; assert 'torch' not in sys.modules"], check=True)


def test_a_perturbed_prompt_is_one_of_the_pool_with_the_asked_noise() -> None:
    prompt_table = tiny_prompts(augment_pool=3)
    embeds = tiny_backbone(prompt_table).embeds
    clean = augment_embeddings(embeds, prompt_table, STEP, Augmentation(0.0), [0, 1, 2, 3], seed=5)
    rows = embeds.select([prompt_table.index[text] for text in prompt_table.augmented[0]]).hidden
    assert all(any(torch.equal(hidden, row) for row in rows) for hidden in clean.hidden)
    noisy = augment_embeddings(embeds, prompt_table, STEP, Augmentation(0.5), [0, 1, 2, 3], seed=5)
    expected = torch.randn(clean.hidden.shape[1:], generator=noise_generator(5, STEP.update, 2, 1))
    torch.testing.assert_close(noisy.hidden[2] - clean.hidden[2], 0.5 * expected)
    alone = augment_embeddings(embeds, prompt_table, STEP, Augmentation(0.5), [2], seed=5)
    assert torch.equal(alone.hidden[0], noisy.hidden[2])
    assert noisy.rows is None  # no stored keys and values belong to it


def test_streams_and_samples_differ() -> None:
    keys = [(5, 7, 2, 0), (5, 7, 2, 1), (5, 7, 3, 0), (5, 8, 2, 0), (6, 7, 2, 0)]
    assert len({noise_generator(*key).initial_seed() for key in keys}) == len(keys)
    assert draw_choice(5, 7, 2) == draw_choice(5, 7, 2) != draw_choice(5, 7, 3)


def test_the_retained_prompts_keep_their_rows() -> None:
    prompt_table = tiny_prompts(["neon style", "cat"])
    whole = PromptTable(prompt_table.variants, prompt_table.augmented, ["a tree", "a house"])
    kept = whole.of_retained()
    assert kept.index == whole.index and len(kept.variants) == 2
    assert [pair.prompt for pair in kept.variants[1]] == ["a tree", "a house"]
    assert {pair.anchor for pair in kept.variants[0]} == {""}
