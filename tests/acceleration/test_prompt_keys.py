"""Keys and values of prompts that are computed once: the same predictions and the same training, fewer projections."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny import flat, tiny_prompts, tiny_unet
from tiny_run import tiny_run, update_all

from fastunlearn.acceleration.text_kv_cache import PromptKeys, cross_attentions
from fastunlearn.config import Config, load_config
from fastunlearn.errors import UserError
from fastunlearn.models.description import describe_model
from fastunlearn.models.parameter_names import trainable_names
from fastunlearn.planning.plan import make_plan
from fastunlearn.training.setup import Run
from fastunlearn.utils.distributed import World

UPDATES = 4


def the_run(scope: str, cached: bool, **model: Any) -> Run:
    cfg = Config.model_validate(
        {
            "concepts": ["neon style"],
            "engine": "fused",
            "model": {"cache_prompt_keys": cached, **model},
            "train": {"max_train_steps": UPDATES, "learning_rate": 1e-3, "scope": scope},
            "kscu": {"start": 4},
            "sampler": {"num_inference_steps": 10},
            "prompts": {"augment_fraction": 0.5},
        }
    )
    return tiny_run(cfg, World(0, 1, torch.device("cpu")), tiny_prompts(), trainable_names(tiny_unet(), scope))


@pytest.mark.parametrize("scope", ["attn2", "noxattn", "full"])
def test_training_ends_with_the_same_weights(scope: str) -> None:
    plain, cached = (the_run(scope, choice) for choice in (False, True))
    start = flat(plain.engine.export_weights().trained)
    for run in (plain, cached):
        update_all(run)
    expected, found = (flat(run.engine.export_weights().trained) for run in (plain, cached))
    assert (found - expected).norm() < 1e-4 * (expected - start).norm()
    assert (expected - start).norm() > 0


@pytest.mark.parametrize(("scope", "spared"), [("attn2", {"frozen"}), ("noxattn", {"frozen", "rollout", "student"})])
def test_nothing_is_projected_where_the_table_has_it(scope: str, spared: set[str]) -> None:
    run = the_run(scope, cached=True)
    calls: Counter[str] = Counter()
    for layer in cross_attentions(run.engine.sampler):
        layer.to_k.register_forward_hook(lambda *_: calls.update(["keys"]))
        layer.to_v.register_forward_hook(lambda *_: calls.update(["values"]))
    models, embeds = run.models, run.models.backbone.embeds
    latents = torch.randn(2, 4, 8, 8)
    conditions = embeds.select([0, 0]), embeds.select([1, 0])
    for name in ("frozen", "rollout", "student", "train"):
        calls.clear()
        getattr(models, name)(latents, models.noise.expand(500, len(latents)), *conditions)
        assert bool(calls) == (name not in spared), name


def test_predictions_are_those_of_the_original_after_training() -> None:
    run = the_run("attn2", cached=True)
    latents, embeds = torch.randn(3, 4, 8, 8), run.models.backbone.embeds
    cond = embeds.select([1, 0, 1])
    times = run.models.noise.expand(300, len(latents))
    (before,) = run.models.frozen(latents, times, cond)
    update_all(run)
    (after,) = run.models.frozen(latents, times, cond)
    assert torch.equal(before, after)
    run.models.frozen_keys = None
    (projected,) = run.models.frozen(latents, times, cond)
    torch.testing.assert_close(after, projected, rtol=1e-5, atol=1e-6)
    (other,) = run.models.frozen(latents, times, embeds.select([0, 1, 0]))
    assert not torch.allclose(after, other, atol=1e-3)  # else this test could not see a wrong row


def test_embeddings_with_noise_are_projected() -> None:
    run = the_run("noxattn", cached=True)
    cond = run.models.backbone.embeds.select([1])
    noisy = type(cond)(cond.hidden + 1.0, cond.pooled)
    latents, times = torch.randn(1, 4, 8, 8), run.models.noise.expand(300, 1)
    assert not torch.equal(run.models.frozen(latents, times, cond)[0], run.models.frozen(latents, times, noisy)[0])


def test_the_planner_knows_the_tables() -> None:
    cfg = load_config(None, ["--concepts", "cat", "--model.cache_prompt_keys", "true"])
    (row,) = [
        row for row in make_plan(cfg, 1, describe_model(cfg)).rows if row.name == "keys and values of the prompts"
    ]
    unet = tiny_unet()
    embeds = the_run("attn2", cached=False).models.backbone.embeds
    keys = PromptKeys(unet, embeds, autocast=False)
    channels = sum(layer.to_k.out_features + layer.to_v.out_features for layer in cross_attentions(unet))
    prompts, tokens, _ = embeds.hidden.shape
    assert keys.nbytes == prompts * tokens * channels * 4
    assert row.device > 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--zero.stage", "3"], "zero.stage 3"),
        (["--model.compile", "regional"], "model.compile"),
        (["--model.attention", "eager"], "eager"),
    ],
)
def test_what_it_cannot_do_is_refused(options: list[str], word: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.cache_prompt_keys: true with .*{word}"):
        load_config(None, ["--concepts", "cat", "--model.cache_prompt_keys", "true", *options])
