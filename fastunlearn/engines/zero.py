"""DeepSpeed: the process group, the engine around the U-Net, gathered weights, and its part of a checkpoint.

What this is: the only file that knows DeepSpeed's internals. The trainer sees an engine that can be called, that steps,
and that hands out full fp32 weights at any ZeRO stage.
What this is not: the loop, the loss or the file layout of a checkpoint (``checkpoint.py``).
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from fastunlearn.config import Config, deepspeed_config, student_updates
from fastunlearn.engines.optimizers import (
    MAX_GROUP_NUMEL,
    build_optimizer,
    keep_small_groups_in_32_bit,
    parameter_groups,
    split_note,
)
from fastunlearn.engines.zero_shards import GradientShards, Piece
from fastunlearn.errors import UserError

CHECKPOINT_TAG = "deepspeed"
BUILD_LOCK_SECONDS = 300  # the build takes well under a minute


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0


def connect() -> World:
    """Join the process group that the launcher (or ``quiet.prepare_environment``) described."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    _remove_stale_build_lock()
    with _library_chatter():
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def unconnected() -> World:
    """This process where ranks have nothing to tell each other: no process group, no DeepSpeed."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), device)


def _remove_stale_build_lock() -> None:
    """A start-up that was killed while it built DeepSpeed's op leaves a lock on which all later ones would wait."""
    from torch.utils.cpp_extension import _get_build_directory

    lock = Path(_get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"
    with contextlib.suppress(OSError):
        if time.time() - lock.stat().st_mtime > BUILD_LOCK_SECONDS:
            lock.unlink()


def disconnect() -> None:
    """Leave the process group, and take along what DeepSpeed leaves in shared memory (64 MiB a rank)."""
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        torch.distributed.destroy_process_group()
        name = f"deepspeed_allreduce_buffer_{os.getuid()}_*_{os.environ.get('MASTER_PORT', '-')}_{rank}"
        for buffer in Path("/dev/shm").glob(name):
            buffer.unlink(missing_ok=True)


def barrier() -> None:
    """Wait for all ranks."""
    torch.distributed.barrier()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a small tensor over all ranks; the input is not changed."""
    total = values.detach().clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def sum_over_ranks(table: Tensor) -> Tensor:
    """The sum of a small tensor over all ranks; the input is not changed."""
    total = table.clone()
    torch.distributed.all_reduce(total)
    return total


def sum_of_counts(counts: Mapping[str, int], world: World) -> dict[str, int]:
    """The same counters over all ranks."""
    table = torch.tensor(list(counts.values()), dtype=torch.int64, device=world.device)
    return dict(zip(counts, sum_over_ranks(table).tolist(), strict=True))


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
        with _library_chatter():
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
    def kept_window(self, keeper: Keeper, _: Kept) -> Iterator[None]:
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
        with _library_chatter():
            self.engine.save_checkpoint(
                str(folder), tag=CHECKPOINT_TAG, save_latest=False, exclude_frozen_parameters=True
            )

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote, at the same stage and world size. Collective.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        try:
            with _library_chatter():
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


@contextlib.contextmanager
def _library_chatter() -> Iterator[None]:
    """Drop what DeepSpeed prints with ``print`` while it sets up, saves or loads."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
