"""What every method shares that edits in closed form: one step before any training, and no updates of its own.

Updates there are only where a meta term makes them, from what the edit leaves. So most settings of a training are a
mistake here, and are refused.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from fastunlearn.errors import UserError
from fastunlearn.methods.base import Method, MethodOutput, MethodSpec, UNetCalls
from fastunlearn.registry import ENGINES
from fastunlearn.sampling.batch import UnlearnBatch
from fastunlearn.sampling.key_steps import KeyStep

if TYPE_CHECKING:
    from torch import Tensor

    from fastunlearn.config import Config
    from fastunlearn.denoisers.predictors import Predictors

# What a run without updates never reads, besides the engines' own sections; and the fields of these that it does read.
OF_TRAINING = ("teacher", "surgery", "retain", "sampler", "checkpoint", "train")
STILL_READ = {"train.scope", "train.resolution", "train.cpu_threads", "train.memory_check", "retain.prompts"}


class EditSpec(MethodSpec):
    """Facts of an edit."""

    scope = "attn2_kv"
    edited = "the keys and values of the cross-attentions"
    """``scope`` in words."""
    samples = "none"
    closed_form = True
    retain_timesteps = "uniform"

    def calls(self, cfg: Config) -> UNetCalls:
        """None: the updates of a meta term are not the method's."""
        return UNetCalls(teacher=0, trained=0)

    def refuse(self, cfg: Config) -> None:
        """Settings of updates that are never made, and a preserved prompt that names what is erased."""
        if cfg.has_meta:
            _check_meta_after_edit(cfg)
        elif cfg.train.scope not in ("auto", self.scope):
            raise UserError(
                f"train.scope: {cfg.train.scope!r}, but method {cfg.method!r} edits {self.edited}; "
                f"use {self.scope!r} or 'auto'"
            )
        self.refuse_settings(cfg)
        if not cfg.trains:
            _refuse_training(cfg)
        from fastunlearn.config.run_prompts import preserve_prompts

        preserve_prompts(cfg)

    def refuse_settings(self, cfg: Config) -> None:
        """Refuse settings of the method itself.

        Raises:
            UserError: names the field and the remedy.
        """


class EditMethod(Method):
    """One edit, no updates but those of a meta term."""

    def table(self) -> list[KeyStep]:
        """There are no updates, unless a meta term makes them: then concepts take turns."""
        concepts = len(self.cfg.concepts)
        return [KeyStep(i, i % concepts, 0, restart=False, continues=False) for i in range(self.cfg.max_train_steps)]

    def loss(self, models: Predictors, batch: UnlearnBatch) -> MethodOutput:
        """It has none."""
        raise RuntimeError(f"method {self.cfg.method!r} edits in closed form and has no loss")

    @abstractmethod
    def edit(self, pipeline: Any, device: Any) -> dict[str, Tensor]:
        """The changed tensors of a loaded pipeline's U-Net, fp32 on the host."""


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
    engines = [name for name, spec in ENGINES.items() if spec.Settings is not None]
    for section in ("optimizer", *engines, *OF_TRAINING):
        for field, value in getattr(cfg, section).changed_fields().items():
            if f"{section}.{field}" not in STILL_READ:
                raise UserError(f"{section}.{field}: {value!r} {why}")
    if "engine" in cfg.changed_fields():
        raise UserError(f"engine: {cfg.engine!r} {why}")
    if cfg.resume_from_checkpoint is not None:
        raise UserError(
            f"resume_from_checkpoint: {cfg.resume_from_checkpoint!r} {why}, and start again with overwrite_output_dir"
        )
