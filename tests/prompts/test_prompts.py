"""Prompts of a run: templates, anchors, augmentation."""

from __future__ import annotations

import random

from fastunlearn.config import Concept, PromptsConfig
from fastunlearn.prompts.variants import PromptPair, augment, build_prompt_table, concept_variants

CONTEXTUAL = PromptsConfig(
    templates=["{concept}", "a {concept} in {context} style"],
    contexts=["ink", "neon"],
    anchor_templates=["", "a picture in {context} style"],
)


def test_the_bare_name_is_measured_against_nothing() -> None:
    assert concept_variants(Concept(name="cat"), PromptsConfig())[0] == PromptPair("cat", "")
    assert concept_variants(Concept(name="cat"), PromptsConfig(templates=["{concept}"])) == [PromptPair("cat", "")]


def test_a_context_stays_in_the_anchor() -> None:
    assert concept_variants(Concept(name="cat"), CONTEXTUAL) == [
        PromptPair("cat", ""),
        PromptPair("a cat in ink style", "a picture in ink style"),
        PromptPair("a cat in neon style", "a picture in neon style"),
    ]


def test_the_word_of_a_style_goes_without_style() -> None:
    config = PromptsConfig(templates=["{word} {context}"], contexts=["cat"], anchor_templates=["{context}"])
    assert concept_variants(Concept(name="neon style"), config) == [PromptPair("neon cat", "cat")]
    assert concept_variants(Concept(name="neon style", anchor="ink style"), config) == [
        PromptPair("neon cat", "ink cat")
    ]


def test_an_anchor_concept_replaces_the_concept_everywhere() -> None:
    variants = concept_variants(Concept(name="cat", anchor="dog"), CONTEXTUAL)
    assert variants[0] == PromptPair("cat", "dog")
    assert variants[1] == PromptPair("a cat in ink style", "a dog in ink style")


def test_every_prompt_has_one_row_and_the_empty_prompt_is_row_zero() -> None:
    prompt_table = build_prompt_table([Concept(name="cat"), Concept(name="dog")], CONTEXTUAL, seed=1)
    assert prompt_table.index[""] == 0
    assert len(prompt_table.texts) == len(set(prompt_table.texts)) == len(prompt_table.index)
    assert {"cat", "dog", "a dog in neon style", "a picture in ink style", *prompt_table.augmented[0]} <= set(
        prompt_table.texts
    )
    assert (
        prompt_table.texts == build_prompt_table([Concept(name="cat"), Concept(name="dog")], CONTEXTUAL, seed=1).texts
    )


def test_augmentations_keep_the_concept_and_do_what_they_are_called() -> None:
    draw = random.Random(0)
    prompt, concept = "a picture of a sports car", "sports car"
    assert sorted(augment(concept, prompt, 0, draw).split()) == sorted(prompt.split())
    shorter = augment(concept, prompt, 1, draw)
    assert len(shorter.split()) == 5 and "sports car" in shorter
    assert augment(concept, prompt, 2, draw).endswith(prompt)
    assert augment(concept, prompt, 3, draw).startswith(prompt)
    assert augment("cat", "cat", 1, draw) == "cat"
