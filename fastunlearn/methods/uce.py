"""UCE, Unified Concept Editing (arXiv 2308.14761): concepts erased in closed form, without training.

What this is: which weights the three sums of the objective get, and the one edit of all keys and values.
What this is not: the algebra (``closed_form.py``), or which prompts and tokens enter (``concept_edit.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastunlearn.config import resolved_steps
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.methods.base import Method, MethodOutput
from fastunlearn.methods.parts.closed_form import Tokens, Weights, erase, with_negative_guidance
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.rollout import UnlearnBatch


class UCE(Method):
    """One edit, no updates but those of a meta term."""

    closed_form = True

    def table(self) -> list[KeyStep]:
        """There are no updates, unless a meta term makes them: then concepts take turns."""
        concepts = len(self.cfg.concepts)
        return [KeyStep(i, i % concepts, 0, restart=False, continues=False) for i in range(resolved_steps(self.cfg))]

    def loss(self, models: Predictors, window: UnlearnBatch) -> MethodOutput:
        """There is no loss to descend."""
        raise RuntimeError(f"method {self.cfg.method!r} edits in closed form and has no loss")

    def text_map(self, tokens: Tokens, projections: Mapping[str, Tensor]) -> Tensor:
        """What every projection is to be multiplied with, (D, D) in fp64."""
        return erase(with_negative_guidance(tokens, self.cfg.uce.negative_guidance), self.weights)

    @property
    def weights(self) -> Weights:
        """Of the objective's sums."""
        uce = self.cfg.uce
        return Weights(uce.erase_scale, uce.preserve_scale, uce.regularisation)
