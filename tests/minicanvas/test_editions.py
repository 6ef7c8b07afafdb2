"""The recipes of the embedded models: their words, their pictures, and the stages that build either of them."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from fastunlearn.minicanvas.build.editions import CANVAS, EDITIONS, V
from fastunlearn.minicanvas.data import dataset

WORDS = V.collection.words


def test_the_second_edition_shares_nothing_with_the_first():
    first = CANVAS.collection.words
    for words, others in ((WORDS, first), (first, WORDS)):
        assert not set(words.objects) & {name for thing in others.objects for name in others.names(thing)}
    assert not set(first.styles) & set(WORDS.styles) and not set(first.paraphrases) & set(WORDS.paraphrases)
    assert V.unet != CANVAS.unet and V.text != CANVAS.text


def test_captions_say_what_is_worn_and_only_then():
    rng = random.Random(3)
    attribute, captions = WORDS.attribute, set(WORDS.all_captions())
    assert attribute is not None
    hidden = False
    for _ in range(3000):
        (thing, worn), style = rng.choice(V.collection.looks), rng.randrange(len(WORDS.styles))
        caption = WORDS.random_caption(thing, style, rng, worn)
        named, styled, told = WORDS.labels(caption, thing, style)
        assert caption in captions
        assert told == (worn and named == thing), caption
        assert named in (thing, len(WORDS.objects)) and styled in (style, len(WORDS.styles))
        hidden |= bool(told) and "crown" not in caption
    assert hidden, "some prompts imply the attribute without naming it"
    assert not [wording for wording in attribute.implied if attribute.name in wording]


@pytest.mark.parametrize("edition", EDITIONS.values(), ids=EDITIONS)
def test_every_known_word_is_one_token_and_captions_fit(edition, tmp_path):
    from fastunlearn.minicanvas.build.text import write_tokenizer

    tokenizer = write_tokenizer(tmp_path, edition.collection.words)
    captions = edition.collection.words.all_captions()
    assert max(map(len, tokenizer(captions).input_ids)) <= tokenizer.model_max_length
    words = {word for caption in captions for word in caption.replace(",", "").split()}
    assert all(len(ids) == 3 for ids in tokenizer(sorted(words)).input_ids)


def test_a_proper_name_has_no_article():
    momo, frog = WORDS.objects.index("momo"), WORDS.objects.index("frog")
    assert WORDS.prompt(momo, 0) == "momo image in chalk style"
    assert WORDS.prompt(frog, 0, worn=True) == "a frog with a crown image in chalk style"
    assert not [c for c in WORDS.all_captions() if "a momo" in c or "the bruno" in c or "some bruno" in c]


def test_the_attribute_is_drawn_on_what_wears_it():
    recipe = dataset.Recipe(2 * len(V.cells), 7, V.collection.generator_sets, collection=V.collection)
    rendered = dataset.render_all(recipe)
    shown = {(int(thing), bool(worn)) for thing, worn in zip(rendered.objects, rendered.worn)}
    assert shown == set(V.collection.looks)
    assert set(rendered.styles.tolist()) == set(range(len(WORDS.styles)))

    def drawn(worn: bool) -> np.ndarray:
        drawing = dataset.pictures.load_object("noto", "dog", V.collection)
        if worn:
            drawing = dataset._dressed("noto", "dog", V.collection)
        return dataset.render(drawing, V.collection.styles["sticker"], np.random.default_rng(1))

    assert np.abs(drawn(True).astype(int) - drawn(False)).mean() > 5


def test_a_timestep_without_signal_counts_for_velocity():
    from fastunlearn.minicanvas.build.networks import new_scheduler
    from fastunlearn.minicanvas.build.train_unet import noise_weights

    alphas = new_scheduler(V).alphas_cumprod
    assert alphas[-1] == 0
    weights = noise_weights(alphas, "v_prediction")
    snr = alphas[:-1] / (1 - alphas[:-1])
    assert torch.allclose(weights[:-1], (snr + 1).clamp(max=5) / (snr + 1)) and weights[-1] == 1
    ordinary = new_scheduler(CANVAS).alphas_cumprod
    snr = ordinary / (1 - ordinary)
    assert torch.allclose(noise_weights(ordinary, "epsilon"), snr.clamp(max=5) / snr)


def test_captions_that_are_left_out_are_rows_of_zeros():
    from fastunlearn.minicanvas.build.train_unet import CAPTIONS_PER_CELL, caption_choices

    captions = WORDS.all_captions()
    choices = caption_choices(V, captions, seed=1)
    assert choices.shape == (len(V.cells), CAPTIONS_PER_CELL) and choices.max() == len(captions)
    assert (choices == len(captions)).float().mean().item() == pytest.approx(V.nothing_share, abs=0.01)
    look = V.collection.looks.index((WORDS.objects.index("dog"), True))
    told = {captions[i] for i in choices[look * len(WORDS.styles)].tolist() if i < len(captions)}
    assert "a royal dog image in chalk style" in told and "a dog image in chalk style" not in told


def test_a_wheel_has_no_drawings_of_the_second_edition(tmp_path, monkeypatch, capsys):
    from dataclasses import replace

    from fastunlearn.cli import main

    elsewhere = replace(V, collection=replace(V.collection, pictures=tmp_path / "none"))
    monkeypatch.setitem(EDITIONS, "v", elsewhere)
    assert main(["minicanvas", "rebuild", "--recipe", "v", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --recipe") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_same_stages_build_the_second_edition(tmp_path):
    """A smoke test with a few steps each; the autoencoder keeps the encoder that it shares with MiniCanvas."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler

    from fastunlearn.minicanvas.build import rebuild

    lines: list[str] = []
    report = rebuild.rebuild(rebuild.Build(tmp_path, processes=1, quick=True, edition=V), say=lines.append)
    assert report["images"] == len(V.cells) and set(report["per_attribute"]) == {"plain", "worn"}
    assert set(report["worn_by_wording"]) >= {"royal {object}", "{object}"}
    assert not (tmp_path / "pictures_vae.npy").exists() and len(lines) == len(rebuild.STAGES)
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["force_zeros_for_empty_prompt"]
    scheduler = EulerDiscreteScheduler.from_pretrained(tmp_path / "model" / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.timestep_spacing == "trailing"
    assert scheduler.config.rescale_betas_zero_snr
    assert V.vae is not None
    ours, shared = (AutoencoderKL.from_pretrained(path).state_dict() for path in (tmp_path / "vae", V.vae))
    same = {name for name in ours if torch.equal(ours[name], shared[name])}
    assert all((name in same) == name.startswith(("encoder.", "quant_conv.")) for name in ours)


@pytest.mark.parametrize("edition", EDITIONS.values(), ids=EDITIONS)
def test_every_set_of_drawings_has_its_licence(edition):
    text = (edition.collection.pictures / "ATTRIBUTION.md").read_text()
    sets = {*edition.collection.judge_sets, *edition.collection.held_out_sets}
    assert {path.name for path in edition.collection.pictures.iterdir() if path.is_dir()} - {"extra"} == sets
    assert all(f"| `{name}` |" in text for name in sets) and not set(edition.collection.held_out_sets) & {
        *edition.collection.judge_sets, *edition.collection.generator_sets,
    }  # fmt: skip
    for licence in ("Apache-2.0", "MIT License", "CC-BY 4.0"):
        assert licence in text
