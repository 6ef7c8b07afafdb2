"""Ranks: joining and leaving the process group, and sums of small tensors over it.

Sharding is DeepSpeed's and lives in ``engines/zero``; here is only what any code needs that runs on several ranks.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastunlearn.errors import UserError
from fastunlearn.utils.processes.relatives import identity

T = TypeVar("T")
SHARED_MEMORY_OP = "deepspeed_shm_comm"
"""DeepSpeed would compile it at the first start on a CPU (a minute, 1.6 GB, a compiler); gloo sums as well."""


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


def init_distributed() -> World:
    """Join the process group that the launcher (or ``environment.prepare_environment``) described."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    with library_chatter():
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def single_process() -> World:
    """This process where ranks have nothing to tell each other: no process group, no DeepSpeed."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), device)


def disconnect() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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


def all_reduce_counts(counts: Mapping[str, int], world: World) -> dict[str, int]:
    """The same counters over all ranks."""
    table = torch.tensor(list(counts.values()), dtype=torch.int64, device=world.device)
    return dict(zip(counts, sum_over_ranks(table).tolist(), strict=True))


def ranks_here() -> dict[int, str]:
    """The other ranks on this host: process number, name. Collective."""
    own = identity()
    known = {
        pid: f"rank {rank} (process {pid})"
        for rank, (host, namespace, pid) in enumerate(gather_from_ranks(own))
        if (host, namespace) == own[:2]
    }
    return {pid: name for pid, name in known.items() if pid != own[2]}


def max_over_ranks(values: Sequence[int]) -> list[int]:
    """The largest of each of a few small numbers, without the device; at once where there is one rank. Collective."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [int(value) for value in values]
    table = torch.tensor([int(value) for value in values])
    torch.distributed.all_reduce(table, torch.distributed.ReduceOp.MAX, group=_host_group())
    return table.tolist()


@cache
def _host_group() -> Any:
    """A group for what lies on the host; where ranks meet on the host anyway, theirs."""
    return None if torch.distributed.get_backend() == "gloo" else torch.distributed.new_group(backend="gloo")


def gather_from_ranks(value: T) -> list[T]:
    """Each rank's value, in the order of ranks. Plain values only: they are pickled on the way."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """What happens inside succeeds on every rank or on none. Collective; the block itself should not be.

    Raises:
        UserError: on all ranks, the first that one of them raised.
    """
    failure: str | None = None
    try:
        yield
    except UserError as error:
        failure = str(error)
    failed = [text for text in gather_from_ranks(failure) if text is not None]
    if failed:
        raise UserError(failed[0])


@contextlib.contextmanager
def library_chatter() -> Iterator[None]:
    """Drop what DeepSpeed prints with ``print`` while it sets up, saves or loads."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
