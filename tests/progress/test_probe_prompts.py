"""What a probe draws: held out from training, English, and the same for the same run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from fastunlearn.config import Concept, Config, load_config
from fastunlearn.config.base import named_concepts
from fastunlearn.minicanvas import PARAPHRASES, SYNONYMS
from fastunlearn.progress.prompts import kept_pictures, probe_pairs, probe_texts
from fastunlearn.prompts.variants import build_prompt_table

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def preset(name: str, *options: str) -> Config:
    return load_config(str(PRESETS[0].parent / f"{name}.toml"), list(options))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_no_probe_is_a_prompt_of_the_training(path: Path) -> None:
    cfg = load_config(str(path), [])
    table = build_prompt_table(named_concepts(cfg), cfg.prompts, cfg.seed)
    trained = {pair.prompt for variants in table.variants for pair in variants}
    trained |= {prompt for pool in table.augmented for prompt in pool}
    pairs = probe_pairs(cfg)
    assert trained.isdisjoint(pair.prompt for pair in pairs)
    assert len(pairs) == cfg.progress.pairs * len(cfg.concepts)
    assert len({pair.seed for pair in pairs}) == cfg.progress.pairs
    assert len(kept_pictures(cfg)) == cfg.progress.pairs // 2
    for text in probe_texts(cfg):
        words = text.split()
        assert not any(word in ("a", "an") and after in ("a", "an", "the") for word, after in pairwise(words))
        assert not any(word == "a" and after[0] in "aeiou" for word, after in pairwise(words))


@pytest.mark.parametrize("name", ["minicanvas_style", "minicanvas_object"])
def test_the_evaluations_wordings_stay_the_evaluations_own(name: str) -> None:
    """Otherwise a run would stop when its own test is passed."""
    cfg = preset(name)
    texts = " | ".join(probe_texts(cfg))
    assert not any(synonym in texts for synonyms in SYNONYMS.values() for synonym in synonyms if " " in synonym)
    marks = [template.split("}")[1].split("{")[0].strip() for template in PARAPHRASES]
    assert not any(mark in texts for mark in marks if mark)


def test_a_pair_differs_by_its_concept_alone() -> None:
    for pair in probe_pairs(preset("minicanvas_style", "--concepts", "neon style")):
        assert "neon" in pair.prompt and "neon" not in pair.anchor
    anchored = preset("minicanvas_object")
    anchored = anchored.model_copy(update={"concepts": [Concept(name="cat", anchor="fish")]})
    for pair in probe_pairs(anchored):
        assert pair.prompt.replace("a cat", "a fish") == pair.anchor


def test_kept_pictures_show_what_is_kept_and_nothing_that_goes() -> None:
    cfg = preset("sdxl_24gb_style")
    prompts = [picture.prompt for picture in kept_pictures(cfg)]
    assert all(any(name.split()[-1] in prompt or name in prompt for name in cfg.keep) for prompt in prompts)
    assert not any("Van Gogh" in prompt for prompt in prompts)


def test_without_anything_to_keep_plain_things_are_watched() -> None:
    cfg = load_config(None, ["--concepts", "dog", "--model.pretrained_model_name_or_path", "some/model"])
    prompts = [picture.prompt for picture in kept_pictures(cfg)]
    assert len(prompts) == 4 and not any("dog" in prompt for prompt in prompts)
    assert all(picture.seed != picture.other_seed for picture in kept_pictures(cfg))


def test_several_concepts_have_pairs_of_their_own_from_the_same_noise() -> None:
    cfg = preset("minicanvas_style", "--concepts", "neon style; ink style")
    first, second = ([pair for pair in probe_pairs(cfg) if pair.concept == i] for i in (0, 1))
    assert len(first) == len(second) == 8 and [p.seed for p in first] == [p.seed for p in second]
    assert not any("ink" in pair.prompt for pair in first)
