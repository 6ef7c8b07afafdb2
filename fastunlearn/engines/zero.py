"""DeepSpeed: the process group, the engine around the U-Net, gathered weights, and its part of a checkpoint.

What this is: the only file that knows DeepSpeed's internals. The trainer sees an engine that can be called, that steps,
and that hands out full fp32 weights at any ZeRO stage.
What this is not: the loop, the loss or the file layout of a checkpoint (``checkpoint.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from fastunlearn.config import Config, student_updates
from fastunlearn.engines.optimizers import (
    MAX_GROUP_NUMEL,
    build_optimizer,
    keep_small_groups_in_32_bit,
    parameter_groups,
    split_note,
)
from fastunlearn.engines.zero_config import deepspeed_config
from fastunlearn.engines.zero_shards import GradientShards, Piece
from fastunlearn.errors import UserError
from fastunlearn.utils.distributed import World, library_chatter

CHECKPOINT_TAG = "deepspeed"


Kept = Literal["retain", "meta"]
"""Of what a gradient is that is put aside: of what must be kept, or of the meta term."""


class Keeper(Protocol):
    """What takes over a gradient that is put aside: ``surgery.Surgery``."""

    def keep(self, pieces: list[Piece]) -> None: ...


class Engine:
    """The student U-Net under DeepSpeed. Call it like the U-Net."""

    steps_in_backward: Literal[False] = False

    def __init__(
        self, unet: nn.Module, cfg: Config, world: World, originals: Mapping[str, Tensor] | None = None
    ) -> None:
        """Shard the parameters of ``unet`` that require a gradient. The frozen ones stay as they are below stage 3.

        ``originals``: the trained tensors in fp32, where ``unet`` holds them rounded. DeepSpeed makes its master
        weights from ``unet``, so without them whatever the rounding took would be missing from the result.
        """
        import deepspeed

        self.stage = cfg.zero.stage
        self.named = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        groups = parameter_groups(self.named.items())
        if world.is_main and (note := split_note(groups)):
            print(note)
        optimizer = build_optimizer(groups, cfg.optimizer, cfg.train.learning_rate)
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
        if cfg.optimizer.name != "adamw" and self.stage > 0:
            keep_small_groups_in_32_bit(self._flat_groups(), groups)
        self._shards = GradientShards(
            self.engine.optimizer, self.stage, cfg.zero.offload_optimizer == "cpu", self.named
        )
        if originals is not None:
            self._shards.set_masters(originals)
        self._grad_norm: Tensor | float | None = None

    def __call__(self, *args: Tensor, **kwargs: object) -> tuple[Tensor, ...]:
        """A recorded forward pass."""
        return self.engine(*args, **kwargs)

    @property
    def sampler(self) -> nn.Module:
        """The same weights for calls without a gradient: the module, so that DeepSpeed's counters are left alone."""
        return self.engine.module

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return float(self.engine.optimizer.param_groups[0]["lr"])

    @property
    def grad_norm(self) -> Tensor | float | None:
        """Global norm of the last update's gradient, before clipping; None where it was skipped."""
        return self._grad_norm

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of one micro-batch, divided by their number; after the ``last`` of a window every
        rank holds the mean over ranks of its own part."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    @contextlib.contextmanager
    def capture_gradient(self, keeper: Keeper, _: Kept) -> Iterator[None]:
        """Inside, gradients are for later: at the end ``keeper`` takes this rank's shard of them."""
        yield
        keeper.keep(self.take_gradient())

    def take_gradient(self) -> list[Piece]:
        """This rank's part of the window's gradient, out of the engine's hands: the next window starts from nothing."""
        return self._shards.take()

    def gradient(self) -> list[Piece]:
        """This rank's part of the window's gradient, to be edited in place before ``step``."""
        return self._shards.read()

    def second_moments(self) -> list[Tensor] | None:
        """AdamW's second moment for each piece of ``gradient``; None before the first update."""
        return self._shards.second_moments()

    def step(self, grad_norm: Tensor | None = None) -> None:
        """Update the weights with the window's gradient. ``grad_norm``: its norm, where surgery has measured it."""
        if grad_norm is None and self.stage == 0:
            gradients = [p.grad for p in self.named.values() if p.grad is not None]
            grad_norm = torch.nn.utils.get_total_norm(gradients)
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        self._grad_norm = self.engine.get_global_grad_norm() if grad_norm is None else grad_norm

    def skip_step(self) -> None:
        """Drop the window's gradient and leave the weights, the optimizer and the learning rate as they are."""
        self._shards.take()
        self._grad_norm = None

    def full_weights(self) -> dict[str, Tensor]:
        """The trained parameters in fp32 on the host, from the master weights. Collective: every rank must call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.named.items():
            full = parameter.detach() if self.stage == 0 else safe_get_full_fp32_param(parameter)
            # A clone: at world size one the answer can be a view of the live master weights.
            weights[name] = full.detach().float().cpu().clone().contiguous()
        return weights

    def save(self, folder: Path) -> None:
        """Write this rank's part of the optimizer and the trained weights. Collective."""
        with library_chatter():
            self.engine.save_checkpoint(
                str(folder), tag=CHECKPOINT_TAG, save_latest=False, exclude_frozen_parameters=True
            )

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote, at the same stage and world size. Collective.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        try:
            with library_chatter():
                path, _ = self.engine.load_checkpoint(str(folder), tag=CHECKPOINT_TAG, load_module_strict=False)
        except (OSError, RuntimeError, KeyError, ValueError, EOFError, AssertionError) as error:
            reason = str(error)[:120]
            raise UserError(f"resume_from_checkpoint: {folder} cannot be read ({reason}); use another one") from error
        if path is None:
            raise UserError(f"resume_from_checkpoint: {folder} holds no DeepSpeed state; use another checkpoint")

    def _settings(self, cfg: Config, world: World) -> dict:
        settings = deepspeed_config(cfg, world.world_size)
        if self.stage > 0:
            # The bucket is allocated at its full size, so it should not be larger than what is reduced.
            total = sum(p.numel() for p in self.named.values())
            settings["zero_optimization"]["reduce_bucket_size"] = min(cfg.zero.reduce_bucket_size, total)
        if self.stage == 3:
            # One flat partition per group, as at the other stages; DeepSpeed's own limit of 1e9 would cut large ones.
            settings["zero_optimization"]["sub_group_size"] = MAX_GROUP_NUMEL
        return settings

    def _flat_groups(self) -> list[Tensor]:
        optimizer = self.engine.optimizer
        if self.stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)
