"""RECE, Reliable and Efficient Concept Erasure (arXiv 2407.12383): UCE, and then what would still evoke the concept.

What this is: rounds of deriving, in closed form, the tokens with which the edited projections answer most like the
original ones did to the concept, and of erasing those too.
What this is not: the algebra (``closed_form.py``).

One round, from the projections W of the round before; W0 are the original ones, c the concept's tokens, a what takes
their place, p what is preserved:
    c' = argmin  sum over projections ||W c' - W0 c||^2 + embedding_regularisation ||c'||^2
    W  = argmin  e ||W' c' - W0 a||^2 + r ||W' p - W0 p||^2 + l ||W' - W||^2      over W'
Where ``rece.cumulative``, which is ours, the second line also holds every c and c' of before.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastunlearn.methods.parts.closed_form import (
    Tokens,
    Weights,
    concat,
    erase,
    gram,
    solve_evoking_tokens,
    with_negative_guidance,
)
from fastunlearn.methods.uce import UCE


class RECE(UCE):
    """UCE and its rounds."""

    def text_map(self, tokens: Tokens, projections: Mapping[str, Tensor]) -> Tensor:
        """What every projection is to be multiplied with, (D, D) in fp64."""
        rece = self.cfg.rece
        weights = Weights(rece.erase_scale, rece.preserve_scale, rece.regularisation)
        moved = erased = with_negative_guidance(tokens, self.cfg.uce.negative_guidance)
        found, answers = erase(moved, self.weights), gram(projections.values(), tokens.erased.device)
        sources = moved.of_the_name() if rece.tokens == "name" else moved
        for _ in range(rece.rounds):
            derived = solve_evoking_tokens(sources.erased, found, answers, rece.embedding_regularisation)
            new = Tokens(derived, sources.anchors, sources.preserved)
            erased = concat(erased, new) if rece.cumulative else new
            found = erase(erased, weights, start=found)
        return found
