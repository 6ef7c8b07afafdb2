"""The trainer's own update as a subject; ``surgery=loop`` and ``meta=copy`` do one part of it the published way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from fastunlearn.config import Config, resolved_steps
from fastunlearn.denoisers.predictors import Evaluations
from fastunlearn.engines.fused.engine import FusedEngine
from fastunlearn.meta.memory import pool_sizes
from fastunlearn.methods.tables import build_method
from fastunlearn.planning.unet_calls import count_evaluations, pools
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.training.setup import prepare
from fastunlearn.training.trainer import one_update
from fastunlearn.utils.distributed import World, init_distributed
from update.baselines.deep_copy_meta import DeepCopyMeta
from update.baselines.surgery_loop import surgery_loop
from update.instruments.clock import Clock
from update.rows import Row
from update.subjects.models import loading
from update.subjects.protocol import Whole, watch_models


class Ours:
    """The trainer's run of ``cfg``; of the row it needs to know what is replaced."""

    def __init__(self, cfg: Config, row: Row, device: torch.device) -> None:
        # The fused engine needs no process group, and so no DeepSpeed.
        world = init_distributed() if cfg.engine_spec.needs_process_group(cfg) else World(0, 1, device)
        with loading(cfg, device):
            self.run = prepare(cfg, world)
        engine: Any = self.run.engine
        if row["surgery"] == "loop":
            engine.transforms.apply = surgery_loop(engine.transforms)
        if self.run.meta is not None:
            term = DeepCopyMeta(self.run) if row["meta"] == "copy" else self.run.meta
            self._term = term.capture
            self.run.meta.capture = self._meta_window  # type: ignore[assignment]
        self.models = self.run.models
        self.of_meta = Evaluations()

    def steps(self) -> Sequence[KeyStep]:
        """The method's table."""
        return self.run.table

    def restart(self, step: KeyStep, index: int) -> None:
        """As the update loop does it; methods without trajectories have nothing to restart."""
        if self.run.method.spec.samples == "trajectories":
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
        clock.watch(run.engine, "apply", "optimizer")
        if run.meta is not None:
            clock.watch(self, "_term", "meta")
        if isinstance(run.engine, FusedEngine):
            clock.watch(run.engine, "_complete", "step_in_backward")
        elif run.cfg.retains:
            engine: Any = run.engine
            clock.watch(engine._shards, "take", "surgery")
            clock.watch(engine._shards, "read", "surgery")
            clock.watch(engine.transforms, "store", "surgery")
            clock.watch(engine.transforms, "apply", "surgery")
        if run.cfg.retains:
            clock.watch(run.engine.guard, "allows", "surgery")

    def _meta_window(self, *arguments: Any) -> dict[str, torch.Tensor]:
        """The meta term, its evaluations counted."""
        before = asdict(self.models.evaluations)
        found = self._term(*arguments)
        for name, count in asdict(self.models.evaluations).items():
            setattr(self.of_meta, name, getattr(self.of_meta, name) + count - before[name])
        return found


def whole_of_ours(cfg: Config) -> Whole:
    """The run that this configuration describes, counted from its key-step table."""
    method = build_method(cfg)
    table, count = method.table(), count_evaluations(cfg, 1)
    restart = sum(2 * cfg.train.train_batch_size * step.index for step in table if step.restart)
    pictures = pools(cfg) * cfg.retain.num_images + pool_sizes(cfg)[0]
    pool = 2 * pictures * cfg.retain.num_inference_steps
    if cfg.teacher.storage == "cached":
        restart = count.rollout
        pool += 3 * cfg.teacher.trajectories * len({(step.concept, step.index) for step in table})
    return Whole(resolved_steps(cfg), count, restart, pool)
