"""How DeepSpeed cuts the trained tensors over ranks, as arithmetic: the one statement of that rule.

For what is planned before DeepSpeed is there. A run reads the cut from DeepSpeed itself (``shards.py``), and
``tests/planning/test_planning.py`` holds the two against each other at every stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastunlearn.utils.memory_rows import Sizes

ALIGNMENT = 2  # elements per rank to which stages 1 and 2 pad a group (DeepSpeed's nccl_start_alignment_factor)


@dataclass(frozen=True)
class Partition:
    """What one rank owns of one tensor that the optimizer steps: at stages 1 to 3 a flat group."""

    bits: int
    numel: int
    """With padding."""
    pieces: tuple[int, ...]
    """Elements of each parameter in it."""
    whole: int
    """Elements of all parameters of which it holds a piece."""


def rank_partitions(sizes: Sizes, stage: int, world: int, rank: int) -> list[Partition]:
    """One rank's: at stage 0 every tensor, at stages 1 and 2 a contiguous part of each group, at stage 3 a part of each
    tensor."""
    if stage == 0:
        return [Partition(bits, n, (n,), n) for bits, numels in sizes.groups for n in numels]
    if stage < 3:
        return [_contiguous(bits, numels, world, rank) for bits, numels in sizes.groups]
    pieces = [(bits, tuple(-(-n // world) for n in numels)) for bits, numels in sizes.groups]
    return [Partition(bits, sum(own), own, sum(own)) for bits, own in pieces]


def _contiguous(bits: int, numels: Sequence[int], world: int, rank: int) -> Partition:
    length = -(-sum(numels) // (ALIGNMENT * world)) * ALIGNMENT
    begin, pieces, whole, offset = rank * length, [], 0, 0
    for n in numels:
        inside = min(offset + n, begin + length) - max(offset, begin)
        if inside > 0:
            pieces.append(inside)
            whole += n
        offset += n
    return Partition(bits, length, tuple(pieces), whole)
