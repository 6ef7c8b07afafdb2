"""Targets that are made before training: they are the original's, training asks nobody else, runs can be repeated."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from surgery_case import the_prompts, trained_names
from tiny import flat, tiny_unet
from tiny_run import tiny_run, update_all

from fastunlearn.config import Config
from fastunlearn.denoisers.predictors import no_teacher
from fastunlearn.errors import UserError
from fastunlearn.planning.unet_calls import count_evaluations
from fastunlearn.sampling.cached_sampler import CachedSampler, sample_targets
from fastunlearn.sampling.rollout import Rollout
from fastunlearn.training.setup import Run
from fastunlearn.utils.distributed import World

WORLD = World(0, 1, torch.device("cpu"))


def config(**changes: Any) -> Config:
    data: dict[str, Any] = {
        "concepts": ["neon style"], "engine": "fused", "progress": {"enabled": False},
        "sampler": {"num_inference_steps": 10},
        "teacher": {"storage": "cached", "trajectories": 3}, "kscu": {"start": 20},
        "prompts": {"augment_fraction": 0.3},
        "train": {"max_train_steps": 8, "train_batch_size": 2, "learning_rate": 1e-3},
    }  # fmt: skip
    return Config.model_validate(data | changes)


def cached_run(cfg: Config) -> Run:
    """As ``trainer.prepare`` puts it together."""
    run = tiny_run(cfg, WORLD, the_prompts(), trained_names(tiny_unet()))
    targets = sample_targets(cfg, run.models, the_prompts(), run.table, progress=False)
    assert isinstance(run.rollout, Rollout)
    run.rollout = CachedSampler(cfg, run.models, the_prompts(), run.rollout.layout, targets)
    run.models.teacher = no_teacher
    return run


@pytest.mark.parametrize("method", ["kscu", "esd"])
def test_it_trains_without_a_teacher_and_counts_what_it_evaluates(method: str) -> None:
    cfg = config(method=method)
    run = cached_run(cfg)
    before = flat(run.engine.export_weights().trained)
    update_all(run)
    assert float((flat(run.engine.export_weights().trained) - before).norm()) > 0
    assert asdict(run.models.evaluations) == asdict(count_evaluations(cfg, 1))


def test_targets_are_the_originals_predictions_whatever_the_student_has_become() -> None:
    run, prompt_table = cached_run(config()), the_prompts()
    update_all(run)
    original = tiny_unet()
    (window,) = run.rollout.batches(run.table[3], None)
    assert window.targets is not None
    for name in ("cond", "anchor", "uncond"):
        wanted = run.models.backbone.predict(original, window.latents, window.timesteps, getattr(window, name))
        torch.testing.assert_close(window.targets[name], wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(window.targets["cond"], window.targets["uncond"])
    assert prompt_table.index  # the same prompt_table that the targets were made with


def test_the_latents_are_those_of_the_originals_guided_trajectory() -> None:
    """Walked by hand with diffusers' own scheduler."""
    run = cached_run(config())
    assert isinstance(run.rollout, CachedSampler)
    first, second = (run.rollout.targets[0, index][1] for index in (run.table[0].index, run.table[1].index))
    scheduler, scale = run.models.backbone.noise.scheduler, 3.0
    guided = first.uncond + scale * (first.cond - first.uncond)
    time = run.rollout.timesteps[run.table[0].index]
    scheduler.set_timesteps(len(run.rollout.timesteps))
    wanted = scheduler.step(guided, time, first.latents, eta=0.0).prev_sample
    torch.testing.assert_close(second.latents, wanted, rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    weights = []
    for seed in (1, 1, 2):
        run = cached_run(config(seed=seed))
        update_all(run)
        weights.append(flat(run.engine.export_weights().trained))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_teacher_is_gone() -> None:
    run = cached_run(config())
    (window,) = run.rollout.batches(run.table[0], None)
    with pytest.raises(RuntimeError, match="cached"):
        run.models.frozen(window.latents, window.timesteps, window.cond)


def test_what_needs_a_frozen_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"^teacher\.storage: 'cached' leaves no frozen model"):
        config(surgery={"enabled": True})
    config(surgery={"enabled": True}, retain={"target": "noise"})
    with pytest.raises(UserError, match=r"^teacher\.storage: .* 'doco'"):
        anchored = [{"name": "neon style", "anchor": "ink style"}]
        config(method="doco", concepts=anchored, doco={"discriminator_warmup": 1})
