"""The sections of the base methods SDD, UCE and RECE, and what of a configuration has no meaning for them.

What this is: fields with their defaults, and refusals. What this is not: the other sections (``config_sections.py``) or
the other rules (``config_rules.py``, ``config_engine_rules.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fastunlearn.errors import UserError
from fastunlearn.schema.sections import Beta, NotNegative, Section

if TYPE_CHECKING:
    from fastunlearn.config import Config

CLOSED_FORM = ("uce", "rece")
# What a run without updates never reads, and the fields of these sections that it does.
OF_TRAINING = ("optimizer", "zero", "fused", "teacher", "surgery", "retain", "sampler", "checkpoint", "train")
STILL_READ = {"train.scope", "train.resolution", "train.cpu_threads", "train.memory_check", "retain.prompts"}

Positive = Annotated[float, Field(gt=0)]
FromZero = Annotated[float, Field(ge=0)]


class SddConfig(Section):
    """Safe self-Distillation Diffusion (arXiv 2307.05977)."""

    ema_decay: Beta = 0.999
    """Decay of the running mean of the weights that walks the trajectories and is what remains in the end."""
    ema_warmup: bool = False
    """Let the decay rise from nothing as (1 + n) / (10 + n) in update n, for runs much shorter than 1 / (1 - decay)."""


class UceConfig(Section):
    """Unified Concept Editing (arXiv 2308.14761), in closed form. What is preserved: ``keep`` in ``retain.prompts``."""

    tokens: Literal["all", "tail", "last"] = "all"
    """Which tokens enter. all: every position of a prompt and of its anchor; tail: the last word, the end and the
    padding; last: the last word only, as in the published code of 2025."""
    erase_scale: Positive = 1.0
    """Weight of what is erased."""
    preserve_scale: FromZero = 1.0
    """Weight of what is preserved."""
    negative_guidance: FromZero = 1.0
    """How far beyond the anchor the concept is moved, a + g (a - c) in the place of a; published: 0. What a picture
    shows where nothing is asked for may by chance be the concept."""
    regularisation: Positive = 0.5
    """Weight lambda with which the projections are held to what they were."""


class ReceConfig(Section):
    """Reliable and Efficient Concept Erasure (arXiv 2407.12383): rounds after UCE, whose section it reads as well."""

    rounds: NotNegative = 1
    """How often a token is derived and erased; published: 3 for nudity, 2 for other unsafe concepts, else 1; 0: UCE."""
    tokens: Literal["name", "all"] = "name"
    """What tokens are derived from: that in which the concept's name ends, or all that UCE erases."""
    embedding_regularisation: Positive = 0.1
    """Weight lambda of the derived tokens' size; published: 0.1, for styles and hard objects 0.001."""
    erase_scale: Positive = 1.0
    """Weight of the derived tokens."""
    preserve_scale: FromZero = 1.0
    """Weight of what is preserved while they are erased."""
    regularisation: Positive = 0.1
    """Weight with which the projections are held to those of the round before."""
    cumulative: bool = True
    """Whether a round erases again what the rounds before it and UCE erased; published: false, which holds where the
    preserved tokens leave enough directions free, and otherwise gives the concept back."""


def check_base_methods(cfg: Config) -> None:
    """Refuse what has no meaning for the method.

    Raises:
        UserError: the first field.
    """
    if cfg.method == "sdd":
        _check_sdd(cfg)
    if cfg.method not in CLOSED_FORM:
        return
    if cfg.has_meta:
        _check_meta_after_edit(cfg)
    elif cfg.train.scope not in ("auto", "attn2_kv"):
        raise UserError(
            f"train.scope: {cfg.train.scope!r}, but method {cfg.method!r} edits the keys and values of the "
            "cross-attentions; use 'attn2_kv' or 'auto'"
        )
    if cfg.method == "uce" and cfg.rece != ReceConfig():
        raise UserError("rece: its settings do not apply to method 'uce'; drop them, or use method 'rece'")
    if not cfg.trains:
        _refuse_training(cfg)
    from fastunlearn.prompts.preserved import preserve_prompts  # which knows Config

    preserve_prompts(cfg)


def _check_sdd(cfg: Config) -> None:
    if cfg.zero_stage == 3:
        raise UserError(
            "zero.stage: 3 with method 'sdd', whose running mean of the weights is a whole copy on every rank; use "
            "zero.stage 2"
        )
    if cfg.teacher.storage == "cached":
        raise UserError(
            "teacher.storage: 'cached' has no meaning for method 'sdd', whose targets are its student's; use 'exact'"
        )
    if cfg.teacher.storage != "exact" and not cfg.needs_teacher:
        raise UserError(
            f"teacher.storage: {cfg.teacher.storage!r} has no meaning for method 'sdd' without surgery, which needs no "
            "teacher; use 'exact'"
        )


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
    if cfg.engine != "zero":
        raise UserError(f"engine: {cfg.engine!r} {why}")
    if cfg.resume_from_checkpoint is not None:
        raise UserError(
            f"resume_from_checkpoint: {cfg.resume_from_checkpoint!r} {why}, and start again with overwrite_output_dir"
        )
