"""RECE, Reliable and Efficient Concept Erasure (arXiv 2407.12383): UCE, and then what would still evoke the concept.

Rounds of deriving, in closed form, the tokens with which the edited projections answer most like the original ones did
to the concept, and of erasing those too. The algebra is in ``parts/closed_form.py``.

One round, from the projections W of the round before; W0 are the original ones, c the concept's tokens, a their
replacements, p what is preserved:
    c' = argmin  sum over projections ||W c' - W0 c||^2 + embedding_regularisation ||c'||^2
    W  = argmin  e ||W' c' - W0 a||^2 + r ||W' p - W0 p||^2 + l ||W' - W||^2      over W'
Where ``rece.cumulative``, which is ours, the second line also holds every c and c' of before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastunlearn.methods.uce import UCE, UceSpec
from fastunlearn.schema.fields import ConfigModel, NonNegativeFloat, NonNegativeInt, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor

    from fastunlearn.config import Config
    from fastunlearn.methods.parts.closed_form import Tokens


class ReceConfig(ConfigModel):
    """Reliable and Efficient Concept Erasure (arXiv 2407.12383): rounds after UCE, whose section it reads as well."""

    rounds: NonNegativeInt = 1
    """How often a token is derived and erased; published: 3 for nudity, 2 for other unsafe concepts, else 1; 0: UCE."""
    tokens: Literal["name", "all"] = "name"
    """What tokens are derived from: that in which the concept's name ends, or all that UCE erases."""
    embedding_regularisation: PositiveFloat = 0.1
    """Weight lambda of the derived tokens' size; published: 0.1, for styles and hard objects 0.001."""
    erase_scale: PositiveFloat = 1.0
    """Weight of the derived tokens. They aim at what the original projections say of the anchor; published: those of
    the round before."""
    preserve_scale: NonNegativeFloat = 1.0
    """Weight of what is preserved while they are erased; published: 0.1."""
    regularisation: PositiveFloat = 0.1
    """Weight with which the projections are held to those of the round before."""
    cumulative: bool = True
    """Whether a round erases again what the rounds before it and UCE erased; published: false, which holds where the
    preserved tokens leave enough directions free, and otherwise gives the concept back."""


class ReceSpec(UceSpec):
    """Facts: UCE's, and the rounds."""

    title = "RECE, Reliable and Efficient Concept Erasure"
    paper = "2407.12383"
    Settings = ReceConfig

    def settings_of_the_edit(self, cfg: Config) -> dict[str, Any]:
        """By dotted name."""
        own = {f"rece.{name}": value for name, value in cfg.rece.model_dump().items()}
        return super().settings_of_the_edit(cfg) | own

    def derived_rounds(self, cfg: Config) -> int:
        """As ``rece.rounds`` says."""
        return cfg.rece.rounds

    def refuse_settings(self, cfg: Config) -> None:
        """It reads both sections."""


class RECE(UCE):
    """UCE and its rounds."""

    spec: ClassVar[UceSpec] = ReceSpec()

    def text_map(self, tokens: Tokens, projections: Mapping[str, Tensor]) -> Tensor:
        """What every projection is to be multiplied with, (D, D) in fp64."""
        from fastunlearn.methods.parts import closed_form as algebra

        rece = self.cfg.rece
        weights = algebra.EditWeights(rece.erase_scale, rece.preserve_scale, rece.regularisation)
        moved = erased = algebra.with_negative_guidance(tokens, self.cfg.uce.negative_guidance)
        found = algebra.erase(moved, self.weights)
        answers = algebra.gram(projections.values(), tokens.erased.device)
        sources = moved.of_the_name() if rece.tokens == "name" else moved
        for _ in range(rece.rounds):
            derived = algebra.solve_evoking_tokens(sources.erased, found, answers, rece.embedding_regularisation)
            new = algebra.Tokens(derived, sources.anchors, sources.preserved, fixed=sources.fixed)
            erased = algebra.concat(erased, new) if rece.cumulative else new
            found = algebra.erase(erased, weights, start=found)
        return found
