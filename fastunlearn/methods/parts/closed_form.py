"""The linear algebra of erasing without training: UCE (arXiv 2308.14761) and RECE (arXiv 2407.12383).

Pure functions on tensors, solved in fp64. Prompts, tokens and the U-Net are in ``concept_edit.py``, the rounds of RECE
in ``methods/rece.py``.

Legend: W0 is a key or value projection of a cross-attention before the edit, W the one after; c a token to be erased
and a its replacement, both (D,) as the text encoders give them; p a token to be preserved. UCE minimises

    e sum ||W c - W0 a||^2 + r sum ||W p - W0 p||^2 + l ||W - W0||^2       (e erase, r preserve, l regularisation)

for every projection by itself. All of them read the same tokens, so that the solutions are one map T of the text side,
(D, D), which is solved for once, however many projections there are; ``M`` is never inverted:

    W = W0 T        T = (e sum a c^T + r sum p p^T + l I) M^-1        M = e sum c c^T + r sum p p^T + l I

Tokens that every prompt shares may be held exactly, which is ours: (T - I) b = 0 for each such b.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FP64 = 8  # bytes
MATRICES = 6  # of (D, D) in fp64 that RECE holds at a time


@dataclass(frozen=True)
class Tokens:
    """What is known of the text, as rows in fp64: each token to be erased with its replacement, and those to preserve.

    ``erased`` and ``anchors``: (N, D), aligned. ``preserved``: (P, D), possibly of no rows. ``own``: the rows of
    ``erased``, (O,) int64, in which a concept's name ends; none given: all of them. ``fixed``: (F, D), independent,
    what no edit may change at all; none given: nothing.
    """

    erased: Tensor
    anchors: Tensor
    preserved: Tensor
    own: Tensor | None = None
    fixed: Tensor | None = None

    def of_the_name(self) -> Tokens:
        """Without what the concept's prompts share with others: their other words, begin, end and padding."""
        if self.own is None:
            return self
        return Tokens(self.erased[self.own], self.anchors[self.own], self.preserved, fixed=self.fixed)


@dataclass(frozen=True)
class EditWeights:
    """Of the three sums in the objective."""

    erase: float
    preserve: float
    regularisation: float


def identity_like(tokens: Tensor) -> Tensor:
    """The map that changes nothing, for tokens like these."""
    return torch.eye(tokens.shape[1], dtype=tokens.dtype, device=tokens.device)


def erase(tokens: Tokens, weights: EditWeights, start: Tensor | None = None) -> Tensor:
    """The map T that minimises UCE's objective, (D, D). ``start``: where the regularisation holds to instead of I.

    With T0 = start the minimum lies at T0 + [e sum (a - T0 c) c^T + r sum (p - T0 p) p^T] M^-1, which loses fewer
    digits than the form above. What the tokens have of the fixed ones does not enter the change, T - T0.
    """
    c, a, p = tokens.erased, tokens.anchors, tokens.preserved
    before = identity_like(c) if start is None else start
    free_c, free_p = (_beside(rows, tokens.fixed) for rows in (c, p))
    moments = weights.erase * free_c.T @ free_c + weights.preserve * free_p.T @ free_p
    moments.diagonal().add_(weights.regularisation)
    missing = weights.erase * free_c.T @ (a - c @ before.T) + weights.preserve * free_p.T @ (p - p @ before.T)
    return before + torch.cholesky_solve(missing, torch.linalg.cholesky(moments)).T


def _beside(rows: Tensor, fixed: Tensor | None) -> Tensor:
    """The rows without their part in the span of the fixed ones."""
    if fixed is None:
        return rows
    basis = torch.linalg.qr(fixed.T).Q
    return rows - rows @ basis @ basis.T


def with_negative_guidance(tokens: Tokens, guidance: float) -> Tokens:
    """The same tokens, moved further: what takes the place of c is a + guidance (a - c) instead of a."""
    anchors = tokens.anchors + guidance * (tokens.anchors - tokens.erased)
    return Tokens(tokens.erased, anchors, tokens.preserved, tokens.own, tokens.fixed)


def concat(one: Tokens, other: Tokens) -> Tokens:
    """What either erases; both preserve the same."""
    erased, anchors = torch.cat([one.erased, other.erased]), torch.cat([one.anchors, other.anchors])
    return Tokens(erased, anchors, one.preserved, fixed=one.fixed)


def gram(projections: Iterable[Tensor], device: torch.device) -> Tensor:
    """The sum of W^T W over all projections, (D, D) in fp64. They come to ``device`` one after the other."""
    total: Tensor | None = None
    for projection in projections:
        exact = projection.to(device, torch.float64)
        total = exact.T @ exact if total is None else total.addmm_(exact.T, exact)
    if total is None:
        raise ValueError("there are no projections")
    return total


def solve_evoking_tokens(rows: Tensor, text_map: Tensor, original_gram: Tensor, regularisation: float) -> Tensor:
    """RECE's derived tokens: what makes the edited projections answer most like the original ones did to ``rows``.

    Minimises sum ||W c' - W0 c||^2 + regularisation ||c'||^2 over all projections, of which only G = sum W0^T W0 is
    needed: with W = W0 T the minimum is (T^T G T + regularisation I)^-1 T^T G c.
    """
    answered = text_map.T @ original_gram
    normal = answered @ text_map
    normal.diagonal().add_(regularisation)
    return torch.cholesky_solve(answered @ rows.T, torch.linalg.cholesky(normal)).T


def edit_weights(projections: Mapping[str, Tensor], text_map: Tensor) -> dict[str, Tensor]:
    """W0 T for every projection, in fp32 on the host. They come to the map's device one after the other.

    Computed as W0 + W0 (T - I), so that fp32 is exact enough for the product.
    """
    change = (text_map - identity_like(text_map)).float()
    edited = {}
    for name, projection in projections.items():
        exact = projection.to(change.device, torch.float32)
        edited[name] = torch.addmm(exact, exact, change).cpu()
    return edited
