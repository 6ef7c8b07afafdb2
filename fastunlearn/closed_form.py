"""The linear algebra of erasing without training: UCE (arXiv 2308.14761) and RECE (arXiv 2407.12383).

What this is: pure functions on tensors, in fp64. What this is not: prompts, tokens or a U-Net (``concept_edit.py``).

Legend: W0 is a key or value projection of a cross-attention as it was, W as it becomes; c a token to be erased and a
what takes its place, both rows of D numbers as the text encoders give them; p a token to be preserved. UCE minimises

    e sum ||W c - W0 a||^2 + r sum ||W p - W0 p||^2 + l ||W - W0||^2       (e erase, r preserve, l regularisation)

for every projection by itself. All of them read the same tokens, so that the solutions are one map T of the text side:

    W = W0 T        T = (e sum a c^T + r sum p p^T + l I) M^-1        M = e sum c c^T + r sum p p^T + l I

T differs from I only by the directions c: it is kept as I + left @ right, with as many columns as there are tokens to
be erased, and SDXL's 140 projections of 2048 inputs take two thin products each. ``M`` is never inverted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MATRICES = 6  # of (D, D) in fp64 that RECE holds at a time


@dataclass(frozen=True)
class Tokens:
    """What is known of the text, as rows in fp64: each token to be erased with its replacement, and those to preserve.

    ``erased`` and ``anchors``: (N, D), aligned. ``preserved``: (P, D), possibly of no rows.
    """

    erased: Tensor
    anchors: Tensor
    preserved: Tensor


@dataclass(frozen=True)
class Weights:
    """Of the three sums in the objective."""

    erase: float
    preserve: float
    regularisation: float


@dataclass(frozen=True)
class TextMap:
    """T = I + left @ right; ``left`` (D, N), ``right`` (N, D)."""

    left: Tensor
    right: Tensor

    @staticmethod
    def identity(width: int, device: torch.device | None = None) -> TextMap:
        """The map that changes nothing."""
        empty = torch.zeros(width, 0, dtype=torch.float64, device=device)
        return TextMap(empty, empty.T)

    def of_rows(self, rows: Tensor) -> Tensor:
        """T applied to tokens, which are rows."""
        return rows + (rows @ self.right.T) @ self.left.T

    def of_weight(self, weight: Tensor) -> Tensor:
        """W0 T, in fp64."""
        exact = weight.to(self.left.device, torch.float64)
        return exact + torch.linalg.multi_dot([exact, self.left, self.right])


def erase(tokens: Tokens, weights: Weights, start: TextMap | None = None) -> TextMap:
    """The map that minimises UCE's objective. ``start``: where the regularisation holds to instead of I.

    With T0 = start the minimum lies at T0 + [e sum (a - T0 c) c^T + r sum (p - T0 p) p^T] M^-1; the second sum is zero
    for T0 = I.
    """
    c, a, p = tokens.erased, tokens.anchors, tokens.preserved
    before = TextMap.identity(c.shape[1], c.device) if start is None else start
    moments = weights.erase * c.T @ c + weights.preserve * p.T @ p
    moments.diagonal().add_(weights.regularisation)
    rows, missing = weights.erase * c, a - before.of_rows(c)
    if start is not None:
        rows, missing = torch.cat([rows, weights.preserve * p]), torch.cat([missing, p - before.of_rows(p)])
    solved = torch.cholesky_solve(rows.T, torch.linalg.cholesky(moments))  # M^-1 [c p], since M is symmetric
    return TextMap(torch.cat([before.left, missing.T], 1), torch.cat([before.right, solved.T]))


def beyond(tokens: Tokens, guidance: float) -> Tokens:
    """The same tokens, moved further: what takes the place of c is a + guidance (a - c) instead of a."""
    anchors = tokens.anchors + guidance * (tokens.anchors - tokens.erased)
    return Tokens(tokens.erased, anchors, tokens.preserved)


def gram(weights: Iterable[Tensor], device: torch.device) -> Tensor:
    """The sum of W^T W over all projections, (D, D) in fp64. They come to ``device`` one after the other."""
    total: Tensor | None = None
    for weight in weights:
        exact = weight.to(device, torch.float64)
        total = exact.T @ exact if total is None else total.addmm_(exact.T, exact)
    if total is None:
        raise ValueError("there are no projections")
    return total


def evoking(rows: Tensor, text_map: TextMap, original_gram: Tensor, regularisation: float) -> Tensor:
    """RECE's derived tokens: what makes the edited projections answer most like the original ones did to ``rows``.

    Minimises sum ||W c' - W0 c||^2 + regularisation ||c'||^2 over all projections, of which only G = sum W0^T W0 is
    needed: with W = W0 T the minimum is (T^T G T + regularisation I)^-1 T^T G c.
    """
    width = rows.shape[1]
    dense = torch.eye(width, dtype=rows.dtype, device=rows.device) + text_map.left @ text_map.right
    answered = dense.T @ original_gram
    normal = answered @ dense
    normal.diagonal().add_(regularisation)
    return torch.cholesky_solve(answered @ rows.T, torch.linalg.cholesky(normal)).T


def edit_weights(weights: Mapping[str, Tensor], text_map: TextMap) -> dict[str, Tensor]:
    """Every projection after the map, in fp32 on the host."""
    return {name: text_map.of_weight(weight).float().cpu() for name, weight in weights.items()}
