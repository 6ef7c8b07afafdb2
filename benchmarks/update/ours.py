"""What a row runs: the trainer's own update, or a named baseline, under one interface.

What this is: how a subject is prepared, brought to a key step, and updated; which of its parts belong to which phase;
and how many U-Net evaluations its whole run makes.
What this is not: the measurement (``worker.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from fastunlearn.config import Config, resolved_steps
from fastunlearn.denoisers.predictors import Evaluations, Predictors
from fastunlearn.engines.fused import FusedEngine
from fastunlearn.methods import build_method
from fastunlearn.planning.unet_calls import count_evaluations, pools
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.training.setup import prepare
from fastunlearn.training.trainer import one_update
from fastunlearn.utils.distributed import World, init_distributed
from whole_step.clock import Clock
from whole_step.models import loading


@dataclass(frozen=True)
class Whole:
    """A run that erases one concept: its updates, and its single-sample U-Net evaluations."""

    updates: int
    evaluations: Evaluations
    restart: int
    """Of the trajectories: those that bring fresh noise to a key step, or that are walked before training."""
    pool: int
    """Of the teacher's: before the first update, for pictures of what is kept and for cached targets."""


class Subject(Protocol):
    """Something that can be measured."""

    models: Predictors

    def steps(self) -> Sequence[KeyStep]:
        """The updates of a run, in order."""

    def restart(self, step: KeyStep, index: int) -> None:
        """Fresh trajectories, walked through ``index`` steps of the sampler; the update that follows does not care."""

    def update(self, step: KeyStep) -> None:
        """One update, without a restart."""

    def watch(self, clock: Clock) -> None:
        """Tell the clock which calls belong to which phase."""


class Ours:
    """The trainer."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        # The fused engine needs no process group, and so no DeepSpeed.
        world = World(0, 1, device) if cfg.engine == "fused" else init_distributed()
        with loading(cfg, device):
            self.run = prepare(cfg, world)
        self.models = self.run.models

    def steps(self) -> Sequence[KeyStep]:
        """The method's table."""
        return self.run.table

    def restart(self, step: KeyStep, index: int) -> None:
        """As the update loop does it; methods without trajectories have nothing to restart."""
        if self.run.method.trajectories:
            self.run.rollout.restart(replace(step, index=index))

    def update(self, step: KeyStep) -> None:
        """As the update loop does it."""
        one_update(self.run, step)

    def watch(self, clock: Clock) -> None:
        """The parts of ``trainer.one_update``."""
        run = self.run
        watch_models(run.models, clock)
        clock.watch(run.rollout, "restart", "restart")
        clock.watch(run.rollout, "advance", "rollout")
        clock.watch(run.engine, "backward", "backward")
        clock.watch(run.engine, "step", "optimizer")
        clock.watch(run.engine, "skip_step", "optimizer")
        if isinstance(run.engine, FusedEngine):
            clock.watch(run.engine, "_complete", "step_in_backward")
        elif run.surgery is not None:
            clock.watch(run.engine, "take_gradient", "surgery")
            clock.watch(run.engine, "gradient", "surgery")
            clock.watch(run.surgery, "keep", "surgery")
            clock.watch(run.surgery, "project", "surgery")
        if run.surgery is not None:
            clock.watch(run.surgery, "is_finite", "surgery")


def watch_models(models: Predictors, clock: Clock) -> None:
    """The three ways to call a U-Net."""
    for method, label in (("rollout", "rollout"), ("frozen", "teacher"), ("train", "forward")):
        clock.watch(models, method, label)


def whole_of_ours(cfg: Config) -> Whole:
    """The run that this configuration describes, counted from its key-step table."""
    method = build_method(cfg)
    table, count = method.table(), count_evaluations(cfg, 1)
    restart = sum(2 * cfg.train.train_batch_size * step.index for step in table if step.restart)
    pool = pools(cfg, method) * 2 * cfg.retain.num_images * cfg.retain.num_inference_steps
    if cfg.teacher.storage == "cached":
        restart = count.rollout
        pool += 3 * cfg.teacher.trajectories * len({(step.concept, step.index) for step in table})
    return Whole(resolved_steps(cfg), count, restart, pool)


def build_subject(row: dict[str, str], cfg: Config, device: torch.device) -> Any:
    """The trainer's run of ``cfg``, or the baseline that the row names."""
    if row["baseline"] == "ours":
        return Ours(cfg, device)
    from baselines import build

    return build(row["baseline"], cfg, row, device)
