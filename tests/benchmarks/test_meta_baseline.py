"""The literal meta term that ours is timed against computes the same gradient."""

from __future__ import annotations

from dataclasses import replace

import torch
from meta_case import ADAMW, Case, build_run
from tiny import flat

from fastunlearn.engines.fused.engine import FusedEngine
from fastunlearn.gradients.shard import GradientShard
from fastunlearn.utils.distributed import World
from update.baselines.deep_copy_meta import DeepCopyMeta

CASE = Case("fused", engine="fused", meta=ADAMW)


def test_the_copy_gives_the_gradient_of_the_term_in_place() -> None:
    found = []
    for literal in (False, True):
        run = build_run(replace(CASE), World(0, 1, torch.device("cpu")))
        assert run.meta is not None
        if literal:
            copy = DeepCopyMeta(run)
            stored: list[GradientShard] = []
            copy.store = lambda _, shards, stored=stored: stored.extend(shards)
            copy.capture(run.table[0], 500)
            found.append(flat({shard.name: shard.tensor.float() for shard in stored}))
            continue
        run.meta.capture(run.table[0], 500)
        name_of = {id(parameter): name for name, parameter in run.engine.named.items()}
        parts = {}
        assert isinstance(run.engine, FusedEngine)
        for layer in run.engine._layers:
            for parameter, tensor in zip(layer.parameters, layer.meta._dequantized(torch.float32), strict=True):
                parts[name_of[id(parameter)]] = tensor
        found.append(flat(parts))
    ours, theirs = found
    assert float(theirs.norm()) > 0
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-2  # the first step of AdamW is a sign
