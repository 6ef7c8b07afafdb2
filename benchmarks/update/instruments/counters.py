"""What an update sends to other ranks, and how often Python asks a tensor for its value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor",
    "reduce_scatter",
)  # fmt: skip
QUESTIONS = ("__bool__", "__float__", "__int__", "item", "tolist")


class Counter:
    """A number that goes up."""

    total = 0


def count_sent() -> Counter:
    """The bytes of the collectives that this rank takes part in, from now on: of each call its largest argument.

    Call it before the ranks meet: DeepSpeed looks the collectives up then, once.
    """
    counter = Counter()

    def counting(name: str) -> None:
        real = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if dist.get_world_size() > 1:
                counter.total += max(map(_size, (*arguments, *options.values())))
            return real(*arguments, **options)

        setattr(dist, name, call)

    for name in COLLECTIVES:
        counting(name)
    return counter


def _size(argument: Any) -> int:
    if isinstance(argument, list | tuple):
        return sum(map(_size, argument))
    return argument.numel() * argument.element_size() if isinstance(argument, torch.Tensor) else 0


@contextmanager
def questions() -> Iterator[Counter]:
    """How often Python asks a tensor for its value inside. On a GPU each of these waits for the device, but for tensors
    that lie on the host, such as AdamW's step counts."""
    counter = Counter()

    def counting(name: str) -> None:
        real = getattr(torch.Tensor, name)

        def call(tensor: Any) -> Any:
            counter.total += 1
            return real(tensor)

        setattr(torch.Tensor, name, call)

    for name in QUESTIONS:
        counting(name)
    try:
        yield counter
    finally:
        for name in QUESTIONS:
            delattr(torch.Tensor, name)  # torch's own, of its base class, are found again
