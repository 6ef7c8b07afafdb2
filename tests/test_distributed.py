"""Every ZeRO stage on two ranks gives the weights of one plain process with the same global batch.

One launch trains all cases of ``distributed_worker.py``; the reference below uses no DeepSpeed.
Stated tolerances, as |w - reference| / |reference - start| over all trained weights: 1e-3 in fp32; 0.2 in bf16 (8 bits
of mantissa in every activation) and with 8-bit optimizer state (Adam's first steps divide by a quantised moment).
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from distributed_worker import CASES, UPDATES, WORLD, Case, config_of
from safetensors.torch import load_file
from tiny import tiny_backbone, tiny_book, tiny_rollout, tiny_unet
from torch import Tensor

from fastunlearn.backbone import set_trainable, trainable_names
from fastunlearn.methods import build_method
from fastunlearn.predictors import Predictors
from fastunlearn.rollout import GuidedPair, Layout
from fastunlearn.teacher import Teacher

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(WORLD), str(WORKER), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@cache
def reference(clip: float) -> tuple[Tensor, Tensor]:
    """Start and end of a plain fp32 AdamW run on the global batch, as flat vectors."""
    book = tiny_book()
    backbone = tiny_backbone(book)
    unet = backbone.unet
    names = trainable_names(unet, "attn2")
    set_trainable(unet, names)
    models = Predictors(backbone, unet, unet, Teacher(unet, names, whole_copy=True))
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    global_batch = CASES[0].batch * WORLD
    rollout = tiny_rollout(models, book, Layout(0, 1, global_batch, 1), steps=10)
    method = build_method(config_of(Case("reference", 0.0)))
    table = method.table()
    assert len(table) == UPDATES
    for step in table:
        if step.restart:
            rollout.restart(step)
        (window,) = rollout.windows(step, method.augmentation(step))
        outcome = method.loss(models, window)
        optimizer.zero_grad()
        assert outcome.loss is not None
        outcome.loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        pairs: list[GuidedPair] = [outcome.pair] if outcome.pair is not None else []
        if step.continues:
            rollout.advance(step, pairs)
    start = tiny_unet().state_dict()
    end = unet.state_dict()
    return flat({name: start[name] for name in names}), flat({name: end[name] for name in names})


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].detach().double().flatten() for name in sorted(weights)])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_equal_one_plain_process(case: Case, trained: Path) -> None:
    start, expected = reference(case.clip)
    got = flat(load_file(trained / f"{case.name}.safetensors"))
    error = (got - expected).norm() / (expected - start).norm()
    assert error <= case.tolerance


def test_the_reference_moves_and_clipping_changes_it() -> None:
    start, plain = reference(0.0)
    _, clipped = reference(1e-4)
    assert (plain - start).norm() > 1e-2
    assert (plain - clipped).norm() / (plain - start).norm() > 1e-3
