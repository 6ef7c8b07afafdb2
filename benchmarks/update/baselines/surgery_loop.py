"""Gradient surgery as DoCo's released trainer does it: a Python loop over tensors that asks the device about each.

Norms and dot product of every tensor, an ``if`` on the device's answer, then torch's clipping. The mathematics is that
of ``fastunlearn/gradients`` with one segment per tensor; the loop needs whole gradients, so it runs at ZeRO stage 0 on
one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastunlearn.gradients.shard import GradientShard
from fastunlearn.gradients.stats import SurgeryStats
from fastunlearn.gradients.transforms import GradientTransforms, Project
from fastunlearn_kernels import SurgeryPlan


def surgery_loop(transforms: GradientTransforms) -> Callable[..., list[SurgeryStats]]:
    """What stands in for ``transforms.apply`` of a run whose one pass is the projection."""
    (projection,) = transforms.passes
    assert isinstance(projection, Project)

    def apply(shards: list[GradientShard], *_: Any) -> list[SurgeryStats]:
        table = torch.zeros(len(shards), 3, dtype=torch.float64)
        stored: Any = transforms.stored["retain"]._stored
        for i, (shard, retain) in enumerate(zip(shards, stored, strict=True)):
            u, r = shard.tensor, retain.to(shard.tensor.dtype)
            dot = torch.dot(u, r)
            if dot < 0:
                u.sub_(r * (dot / torch.dot(r, r)))
            u.add_(r, alpha=projection.cfg.rho)
            table[i] = torch.stack([torch.dot(u, u), dot, torch.dot(r, r)])
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(shard.tensor) for shard in shards]))
        one, zero = torch.ones(()), torch.zeros(())
        return [SurgeryStats(table, SurgeryPlan(zero.expand(len(shards)), one, zero, norm))]

    return apply
