"""Gradient surgery as DoCo's released trainer does it: a Python loop over tensors that asks the device about each.

Norms and dot product of every tensor, an ``if`` on the device's answer, then torch's clipping. The mathematics is that
of ``fastunlearn/gradients`` with one segment per tensor; the loop needs whole gradients, so it runs at ZeRO stage 0 on
one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastunlearn.gradients.projection import Figures, Surgery
from fastunlearn_kernels import Plan


def surgery_loop(surgery: Surgery) -> Callable[..., Figures]:
    """What stands in for ``surgery.project``."""

    def project(pieces: list[Any], *_: Any) -> Figures:
        table = torch.zeros(len(pieces), 3, dtype=torch.float64)
        kept: Any = surgery.kept._kept
        for i, (piece, retain) in enumerate(zip(pieces, kept, strict=True)):
            u, r = piece.tensor, retain.to(piece.tensor.dtype)
            dot = torch.dot(u, r)
            if dot < 0:
                u.sub_(r * (dot / torch.dot(r, r)))
            u.add_(r, alpha=surgery.cfg.rho)
            table[i] = torch.stack([torch.dot(u, u), dot, torch.dot(r, r)])
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(piece.tensor) for piece in pieces]))
        one, zero = torch.ones(()), torch.zeros(())
        return Figures(table, Plan(zero.expand(len(pieces)), one, zero, norm))

    return project
