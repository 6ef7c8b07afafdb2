"""UCE, Unified Concept Editing (arXiv 2308.14761): concepts erased in closed form, without training.

Here are the settings, what they exclude, and the one edit of all keys and values. The algebra is in
``parts/closed_form.py``; which prompts and tokens enter, in ``parts/concept_edit.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastunlearn.errors import UserError
from fastunlearn.methods.base import Method, MethodOutput, MethodSpec, UNetCalls
from fastunlearn.sampling.batch import UnlearnBatch
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.schema.fields import ConfigModel, NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor

    from fastunlearn.config import Config
    from fastunlearn.denoisers.predictors import Predictors
    from fastunlearn.methods.parts.closed_form import Tokens, Weights

# What a run without updates never reads, and the fields of these sections that it does.
OF_TRAINING = ("optimizer", "zero", "fused", "teacher", "surgery", "retain", "sampler", "checkpoint", "train")
STILL_READ = {"train.scope", "train.resolution", "train.cpu_threads", "train.memory_check", "retain.prompts"}


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


class UceSpec(MethodSpec):
    """Facts; RECE shares them."""

    title = "UCE, Unified Concept Editing"
    paper = "2308.14761"
    Settings: type[ConfigModel] | None = UceConfig
    scope = "attn2_kv"
    samples = "none"
    closed_form = True
    retain_timesteps = "uniform"

    def calls(self, cfg: Config) -> UNetCalls:
        """None: the updates of a meta term are not the method's."""
        return UNetCalls(teacher=0, trained=0)

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

    def refuse(self, cfg: Config) -> None:
        """What belongs to updates that there are not, and a preserved prompt that names what is erased."""
        if cfg.has_meta:
            _check_meta_after_edit(cfg)
        elif cfg.train.scope not in ("auto", self.scope):
            raise UserError(
                f"train.scope: {cfg.train.scope!r}, but method {cfg.method!r} edits the keys and values of the "
                "cross-attentions; use 'attn2_kv' or 'auto'"
            )
        self.refuse_settings(cfg)
        if not cfg.trains:
            _refuse_training(cfg)
        from fastunlearn.config.run_prompts import preserve_prompts

        preserve_prompts(cfg)

    def refuse_settings(self, cfg: Config) -> None:
        """Settings of RECE's rounds, which UCE does not have."""
        if cfg.rece != type(cfg.rece)():
            raise UserError("rece: its settings do not apply to method 'uce'; drop them, or use method 'rece'")


class UCE(Method):
    """One edit, no updates but those of a meta term."""

    spec: ClassVar[UceSpec] = UceSpec()

    def table(self) -> list[KeyStep]:
        """There are no updates, unless a meta term makes them: then concepts take turns."""
        concepts = len(self.cfg.concepts)
        return [KeyStep(i, i % concepts, 0, restart=False, continues=False) for i in range(self.cfg.max_train_steps)]

    def loss(self, models: Predictors, batch: UnlearnBatch) -> MethodOutput:
        """There is no loss to descend."""
        raise RuntimeError(f"method {self.cfg.method!r} edits in closed form and has no loss")

    def edit(self, pipeline: Any, device: Any) -> dict[str, Tensor]:
        """New keys and values of the cross-attentions."""
        from fastunlearn.methods.parts.concept_edit import edit_pipeline

        return edit_pipeline(self.cfg, self, pipeline, device)

    def text_map(self, tokens: Tokens, projections: Mapping[str, Tensor]) -> Tensor:
        """What every projection is to be multiplied with, (D, D) in fp64."""
        from fastunlearn.methods.parts.closed_form import erase, with_negative_guidance

        return erase(with_negative_guidance(tokens, self.cfg.uce.negative_guidance), self.weights)

    @property
    def weights(self) -> Weights:
        """Of the objective's sums."""
        from fastunlearn.methods.parts.closed_form import Weights

        uce = self.cfg.uce
        return Weights(uce.erase_scale, uce.preserve_scale, uce.regularisation)


def _check_meta_after_edit(cfg: Config) -> None:
    """The meta term after an edit: there is no gradient of a method beside it, and no trajectory."""
    why = f"with method {cfg.method!r}, which edits in closed form and has no updates but those of the meta term"
    if cfg.meta.every > 1:
        raise UserError(f"meta.every: {cfg.meta.every} {why}; use 1")
    if cfg.teacher.storage == "cached":
        raise UserError(f"teacher.storage: 'cached' {why}, so no trajectories; use 'exact' or 'int8'")
    if cfg.meta.timesteps == "key":
        raise UserError(f"meta.timesteps: 'key' {why}, so no key steps; use 'uniform'")
    if not cfg.retains:
        return
    if cfg.retain_timesteps == "key":
        raise UserError(f"retain.timesteps: 'key' {why}, so no key steps; use 'uniform'")
    if cfg.retain_source == "prompts":
        raise UserError(f"retain.source: 'prompts' {why}, so no trajectories; use 'generated'")


def _refuse_training(cfg: Config) -> None:
    """A run without updates: what belongs to updates is a mistake."""
    why = f"has no meaning for method {cfg.method!r}, which makes no updates; drop it"
    for section in OF_TRAINING:
        values = getattr(cfg, section)
        for field in type(values).model_fields:
            value, default = getattr(values, field), type(values).model_fields[field].default
            if value != default and f"{section}.{field}" not in STILL_READ:
                raise UserError(f"{section}.{field}: {value!r} {why}")
    if cfg.engine != type(cfg).model_fields["engine"].default:
        raise UserError(f"engine: {cfg.engine!r} {why}")
    if cfg.resume_from_checkpoint is not None:
        raise UserError(
            f"resume_from_checkpoint: {cfg.resume_from_checkpoint!r} {why}, and start again with overwrite_output_dir"
        )
