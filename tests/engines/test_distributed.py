"""Every ZeRO stage on two ranks gives the weights of one plain process with the same global batch.

One launch trains all cases of ``distributed_worker.py``; the reference below uses no DeepSpeed.
Stated tolerances, as |w - reference| / |reference - start| over all trained weights: 1e-3 in fp32; 0.2 in bf16 (8 bits
of mantissa in every activation) and with 8-bit optimizer state (Adam's first steps divide by a quantised moment).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from distributed_worker import CASES, UPDATES, WORLD, Case, config_of
from launched import WORKERS, launch
from safetensors.torch import load_file
from tiny import flat, tiny_backbone, tiny_prompts, tiny_rollout, tiny_unet
from torch import Tensor

from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.denoisers.teacher import Teacher
from fastunlearn.methods.tables import build_method
from fastunlearn.models.parameter_names import set_trainable, trainable_names
from fastunlearn.sampling.batch import BatchLayout, GuidedPrediction

BF16 = [case for case in CASES if case.precision == "bf16"]
WORKER = WORKERS / "distributed_worker.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "stdout.txt").write_text(launch(WORKER, folder, world=WORLD))
    return folder


@cache
def reference(clip: float) -> tuple[Tensor, Tensor]:
    """Start and end of a plain fp32 AdamW run on the global batch, as flat vectors."""
    prompt_table = tiny_prompts()
    backbone = tiny_backbone(prompt_table)
    unet = backbone.unet
    names = trainable_names(unet, "attn2")
    set_trainable(unet, names)
    models = Predictors(backbone, unet, unet, Teacher(unet, names, whole_copy=True))
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    global_batch = CASES[0].batch * WORLD
    rollout = tiny_rollout(models, prompt_table, BatchLayout(0, 1, global_batch, 1), steps=10)
    method = build_method(config_of(Case("reference", 0.0)))
    table = method.table()
    assert len(table) == UPDATES
    for step in table:
        if step.restart:
            rollout.restart(step)
        (window,) = rollout.batches(step, method.augmentation(step))
        outcome = method.loss(models, window)
        optimizer.zero_grad()
        assert outcome.loss is not None
        outcome.loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        pairs: list[GuidedPrediction] = [outcome.guided] if outcome.guided is not None else []
        if step.continues:
            rollout.advance(step, pairs)
    start = tiny_unet().state_dict()
    end = unet.state_dict()
    return flat({name: start[name] for name in names}), flat({name: end[name] for name in names})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_equal_one_plain_process(case: Case, trained: Path) -> None:
    start, expected = reference(case.clip)
    got = flat(load_file(trained / f"{case.name}.safetensors"))
    error = (got - expected).norm() / (expected - start).norm()
    assert error <= case.tolerance


@pytest.mark.parametrize("case", BF16, ids=lambda case: case.name)
def test_with_bf16_the_masters_start_from_the_weights_as_they_were(case: Case, trained: Path) -> None:
    start, original = load_file(trained / f"{case.name}-start.safetensors"), tiny_unet().state_dict()
    assert start and all(torch.equal(tensor, original[name]) for name, tensor in start.items())
    assert not torch.equal(flat(start), flat({name: tensor.bfloat16() for name, tensor in start.items()}))


@pytest.mark.parametrize("case", BF16, ids=lambda case: case.name)
def test_with_bf16_a_checkpoint_restores_the_masters(case: Case, trained: Path) -> None:
    end = load_file(trained / f"{case.name}.safetensors")
    loaded = load_file(trained / f"{case.name}-loaded.safetensors")
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in end.items())


def test_groups_that_had_to_be_split_are_said_once(trained: Path) -> None:
    lines = [line for line in (trained / "stdout.txt").read_text().splitlines() if "optimizer:" in line]
    assert len(lines) == 1 and "6 groups of 768, 768, " in lines[0] and "1,000" in lines[0]


def test_the_reference_moves_and_clipping_changes_it() -> None:
    start, plain = reference(0.0)
    _, clipped = reference(1e-4)
    assert (plain - start).norm() > 1e-2
    assert (plain - clipped).norm() / (plain - start).norm() > 1e-3
