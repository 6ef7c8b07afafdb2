"""UCE, Unified Concept Editing (arXiv 2308.14761): concepts erased in closed form, without training.

One edit of all keys and values of the cross-attentions. The algebra is in ``parts/closed_form.py``; which prompts and
tokens enter, in ``parts/concept_edit.py``; what any edit excludes, in ``edit.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastunlearn.errors import UserError
from fastunlearn.methods.edit import EditMethod, EditSpec
from fastunlearn.schema.fields import ConfigModel, NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor

    from fastunlearn.config import Config
    from fastunlearn.methods.parts.closed_form import EditWeights, Tokens


class UceConfig(ConfigModel):
    """Unified Concept Editing (arXiv 2308.14761), in closed form. What is preserved: ``keep`` in ``retain.prompts``."""

    tokens: Literal["all", "tail", "last"] = "all"
    """Which tokens enter. all: every position of a prompt and of its anchor; tail: the last word, the end and the
    padding; last: the last word only, as in the published code of 2025."""
    erase_scale: PositiveFloat = 1.0
    """Weight of what is erased."""
    preserve_scale: NonNegativeFloat = 1.0
    """Weight of what is preserved."""
    negative_guidance: NonNegativeFloat = 1.0
    """How far beyond the anchor the concept is moved, a + g (a - c) instead of a; published: 0. What a picture
    shows where nothing is asked for may by chance be the concept."""
    regularisation: PositiveFloat = 0.5
    """Weight lambda with which the projections are held to what they were."""


class UceSpec(EditSpec):
    """Facts; RECE shares them."""

    title = "UCE, Unified Concept Editing"
    paper = "2308.14761"
    Settings: type[ConfigModel] | None = UceConfig

    def facts(self, cfg: Config) -> list[tuple[str, str]]:
        """What the edit was made with."""
        shown = ", ".join(f"{name} {value}" for name, value in self.settings_of_the_edit(cfg).items())
        return [("edited part of the U-Net", self.scope), ("settings of the edit", shown)]

    def settings_of_the_edit(self, cfg: Config) -> dict[str, Any]:
        """By dotted name."""
        return {f"uce.{name}": value for name, value in cfg.uce.model_dump().items()}

    def derived_rounds(self, cfg: Config) -> int:
        """How often tokens are derived on top of the prompts' own."""
        return 0

    def edit_rows(self, cfg: Config, prompts: int, tokens: int, width: int) -> list[tuple[str, int]]:
        """(name, bytes on the device) of an edit: the tokens of all prompts and the matrices between them, in fp64.

        ``prompts`` of ``tokens`` tokens enter, ``width`` wide.
        """
        from fastunlearn.methods.parts.closed_form import FP64, MATRICES

        rows = prompts * (tokens if cfg.uce.tokens == "all" else tokens // 2 if cfg.uce.tokens == "tail" else 1)
        return [
            ("tokens of the prompts (fp64)", (3 + 2 * self.derived_rounds(cfg)) * rows * width * FP64),
            ("matrices of the edit (fp64)", MATRICES * width * width * FP64),
        ]

    def refuse_settings(self, cfg: Config) -> None:
        """Settings of RECE's rounds, which UCE does not have."""
        if cfg.rece.changed_fields():
            raise UserError("rece: its settings do not apply to method 'uce'; drop them, or use method 'rece'")


class UCE(EditMethod):
    """One edit of all keys and values."""

    spec: ClassVar[UceSpec] = UceSpec()

    def edit(self, pipeline: Any, device: Any) -> dict[str, Tensor]:
        """New keys and values of the cross-attentions."""
        from fastunlearn.methods.parts.concept_edit import edit_pipeline

        return edit_pipeline(self.cfg, self, pipeline, device)

    def text_map(self, tokens: Tokens, projections: Mapping[str, Tensor]) -> Tensor:
        """What every projection is to be multiplied with, (D, D) in fp64."""
        from fastunlearn.methods.parts.closed_form import erase, with_negative_guidance

        return erase(with_negative_guidance(tokens, self.cfg.uce.negative_guidance), self.weights)

    @property
    def weights(self) -> EditWeights:
        """Of the objective's sums."""
        from fastunlearn.methods.parts.closed_form import EditWeights

        uce = self.cfg.uce
        return EditWeights(uce.erase_scale, uce.preserve_scale, uce.regularisation)
