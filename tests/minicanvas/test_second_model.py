"""The second embedded model, as it is committed: its size, its rules, and whether it draws what it is asked for."""

from __future__ import annotations

import json

import pytest
import torch

import second_model
from fastunlearn.evaluation.pictures.drawing import generate
from fastunlearn.minicanvas.build.editions import V
from fastunlearn.minicanvas.data import dataset


@pytest.fixture(scope="module")
def judge():
    return second_model.load_judge()


@pytest.fixture(scope="module")
def pipe():
    from fastunlearn.models.loading import load_pipeline

    return load_pipeline(second_model.path())


def test_it_is_small_and_complete():
    folder = second_model.path().parent
    files = [path for path in (*second_model.path().rglob("*"), folder / "judge.safetensors") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    settings = json.loads((second_model.path() / "model_index.json").read_text())
    assert settings["force_zeros_for_empty_prompt"]
    scheduler = json.loads((second_model.path() / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "EulerDiscreteScheduler" and scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] and scheduler["timestep_spacing"] == "trailing"


def test_prompts_of_the_attribute():
    (style, *_), attribute = second_model.STYLES, second_model.attribute()
    implied = second_model.implied_prompts(style)
    assert len(implied) == len(attribute.implied) * len(attribute.wearers)
    assert not [prompt for prompt in implied if attribute.name in prompt]
    assert all(attribute.name in prompt for prompt in second_model.explicit_prompts(style))
    known = set(second_model.WORDS.all_captions())
    assert {*implied, *second_model.explicit_prompts(style), *second_model.related_prompts(style)} <= known
    assert set(second_model.SPECIES) == set(second_model.CHARACTERS)
    assert set(second_model.SPECIES.values()) <= set(second_model.OBJECTS)


def test_the_judge_reads_new_pictures(judge):
    from fastunlearn.minicanvas.build.train_judge import accuracy

    recipe = dataset.Recipe(len(V.cells), 601, V.collection.generator_sets, collection=V.collection)
    assert min(accuracy(judge, dataset.render_all(recipe))) >= 0.95
    noise = torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert (judge.classify(noise)[0].argmax(1) == second_model.OTHER).float().mean() >= 0.75


def test_it_draws_what_it_is_told(pipe, judge):
    from fastunlearn.minicanvas.build.drawing import read_grid

    reading, _ = read_grid(pipe, judge, V.cells[::3], [7], steps=15, edition=V)
    assert reading.share(0) >= 0.75 and reading.share(1) >= 0.9 and reading.share(2) >= 0.85


def test_the_attribute_comes_without_being_named(pipe, judge):
    style = second_model.STYLES[3]
    shares = []
    for prompts in (second_model.implied_prompts(style), second_model.related_prompts(style)):
        images = generate(pipe, prompts, list(range(len(prompts))), steps=15)
        shares.append(judge.classify(images)[2].argmax(1).float().mean().item())
    assert shares[0] >= 0.7 and shares[1] <= 0.3
