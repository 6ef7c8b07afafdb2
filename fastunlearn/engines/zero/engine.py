"""The student U-Net under DeepSpeed: gathered weights, gradients transformed as shards, its part of a checkpoint.

With ``shards.py`` the only place that knows DeepSpeed's internals.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from fastunlearn.config import Config, student_updates
from fastunlearn.engines.base import Applied, Engine, ExportedWeights
from fastunlearn.engines.optimizers import groups as grouping
from fastunlearn.engines.zero.checkpoint_files import CheckpointFiles
from fastunlearn.engines.zero.deepspeed_config import deepspeed_config
from fastunlearn.engines.zero.shards import GradientShards
from fastunlearn.gradients.guard import FiniteGuard
from fastunlearn.gradients.shard import GradientKind
from fastunlearn.gradients.transforms import build_transforms
from fastunlearn.utils.distributed import World, library_chatter

CHECKPOINT_TAG = "deepspeed"


class ZeroEngine(Engine):
    """DeepSpeed's engine, with the gradient's transforms and the guard before its step."""

    def __init__(
        self, unet: nn.Module, cfg: Config, world: World, originals: Mapping[str, Tensor] | None = None
    ) -> None:
        """Shard the parameters of ``unet`` that require a gradient. The frozen ones stay as they are below stage 3.

        ``originals``: the trained tensors in fp32, where ``unet`` holds them rounded. DeepSpeed makes its master
        weights from ``unet``, so without them whatever the rounding took would be missing from the result.
        """
        import deepspeed

        self.cfg, self.stage = cfg, cfg.zero.stage
        self.named = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        groups = grouping.parameter_groups(self.named.items())
        if world.is_main and (note := grouping.split_note(groups)):
            print(note)
        optimizer = cfg.optimizer_spec.build(groups, cfg.optimizer, cfg.learning_rate)
        schedule = get_scheduler(
            cfg.train.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=cfg.train.lr_warmup_steps,
            num_training_steps=student_updates(cfg),
        )
        with library_chatter():
            self.engine, *_ = deepspeed.initialize(
                model=unet, optimizer=optimizer, lr_scheduler=schedule, config=self._settings(cfg, world)
            )
        self._files = CheckpointFiles()
        self.engine.checkpoint_engine = self._files
        self.engine._copy_recovery_script = lambda folder: None  # programs that unpickle; and they need disk, too
        if self.stage > 0:
            cfg.optimizer_spec.after_sharding(self._flat_groups(), groups)
        offloaded = cfg.zero.offload_optimizer != "none"
        self._shards = GradientShards(self.engine.optimizer, self.stage, offloaded, self.named, cfg.optimizer_spec)
        if originals is not None:
            self._shards.set_masters(originals)
        self.transforms = build_transforms(cfg, list(self.named), world)
        self.guard = FiniteGuard(cfg.surgery.max_skipped_updates)
        self._grad_norm: Tensor | None = None

    def __call__(self, *args: Tensor, **kwargs: object) -> tuple[Tensor, ...]:
        """A recorded forward pass."""
        return self.engine(*args, **kwargs)

    @property
    def sampler(self) -> nn.Module:
        """The module, so that DeepSpeed's counters are left alone."""
        return self.engine.module

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return float(self.engine.optimizer.param_groups[0]["lr"])

    @property
    def grad_norm(self) -> Tensor | None:
        """Global norm of the last update's gradient, before clipping; None where it was skipped."""
        return self._grad_norm

    @property
    def projected_segments(self) -> Sequence[str] | None:
        """Those of ``surgery.granularity``."""
        return self.transforms.segments_of(self.cfg.surgery.granularity) if self.cfg.retains else None

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of one micro-batch, divided by their number; after the ``last`` of a window every
        rank holds the mean over ranks of its own part."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    @contextlib.contextmanager
    def capture_gradient(self, kind: GradientKind) -> Iterator[None]:
        """Inside, gradients are for later: at the end this rank's shard of them is stored, and the next window starts
        from nothing."""
        yield
        self.transforms.store(kind, self._shards.take())

    def apply(self) -> Applied:
        """Transform this rank's shard of the gradient in place, then let DeepSpeed step with it."""
        weighted = self.cfg.retains and self.cfg.surgery.metric == "optimizer"
        second_moments = self._shards.second_moments() if weighted else None
        seen = self.transforms.apply(self._shards.read(), second_moments, self.cfg.optimizer.adam_epsilon)
        projection = seen[0] if self.cfg.retains else None
        self._grad_norm = None
        if not self.guard.allows(*(stats.plan.found_inf for stats in seen)):
            self.transforms.reset_broken(seen)
            self._shards.take()  # weights, optimizer and learning rate stay as they are
            return Applied(False, projection)
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        self._grad_norm = seen[-1].plan.norm
        return Applied(True, projection)

    def export_weights(self) -> ExportedWeights:
        """From the master weights, which were never rounded. Collective: every rank must call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.named.items():
            full = parameter.detach() if self.stage == 0 else safe_get_full_fp32_param(parameter)
            # A clone: at world size one the answer can be a view of the live master weights.
            weights[name] = full.detach().float().cpu().clone().contiguous()
        return ExportedWeights(weights)

    def save(self, folder: Path) -> None:
        """Write this rank's part of the optimizer and the trained weights. Collective.

        Raises:
            UserError: this rank could not write all of it.
        """
        with library_chatter():
            self.engine.save_checkpoint(
                str(folder), tag=CHECKPOINT_TAG, save_latest=False, exclude_frozen_parameters=True
            )
        self._files.raise_failure()

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote, at the same stage and world size. Collective."""
        with library_chatter():
            path, _ = self.engine.load_checkpoint(str(folder), tag=CHECKPOINT_TAG, load_module_strict=False)
        if path is None:
            raise ValueError("no DeepSpeed state")

    def state_dict(self) -> dict[str, Any]:
        """Of the stored gradients, what outlives an update."""
        return self.transforms.state_dict() if self.cfg.retains else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue them."""
        self.transforms.load_state_dict(state)

    def _settings(self, cfg: Config, world: World) -> dict:
        settings = deepspeed_config(cfg, world.world_size)
        if self.stage > 0:
            # The bucket is allocated at its full size, so it should not be larger than what is reduced.
            total = sum(p.numel() for p in self.named.values())
            settings["zero_optimization"]["reduce_bucket_size"] = min(cfg.zero.reduce_bucket_size, total)
        if self.stage == 3:
            # One flat partition per group, as at the other stages; DeepSpeed's own limit of 1e9 would cut large ones.
            settings["zero_optimization"]["sub_group_size"] = grouping.MAX_GROUP_NUMEL
        return settings

    def _flat_groups(self) -> list[Tensor]:
        optimizer = self.engine.optimizer
        if self.stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)
