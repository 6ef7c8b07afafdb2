"""How tensors are cut: into pieces that belong to one segment each, and pieces into chunks for one program each.

A segment is what gets one coefficient: a tensor, a block of the model, everything, or a range of a flat ZeRO partition.
A piece is (tensor, begin, end, segment), in elements. The tables that kernels read are built here: chunk -> (tensor,
begin, end, segment). Where the tensors lie is in `common.tensor_lists`.

Usage: `segments = per_tensor(grads)`; for a flat partition `Segments(((0, 0, 1280, 0), (0, 1280, 4096, 1)), 2)`
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastunlearn_kernels.common.tensor_lists import CHUNK


@dataclass(frozen=True)
class Segments:
    """`pieces`: (tensor, begin, end, segment), elements, in any order; `count`: number of segments."""

    pieces: tuple[tuple[int, int, int, int], ...]
    count: int

    def flat(self) -> list[int]:
        """The pieces as one list of integers, as registered ops take them."""
        return [value for piece in self.pieces for value in piece]


def per_tensor(tensors: Sequence[Tensor]) -> Segments:
    """Each tensor is a segment."""
    return grouped(tensors, range(len(tensors)))


def whole(tensors: Sequence[Tensor]) -> Segments:
    """All tensors together are one segment."""
    return grouped(tensors, [0] * len(tensors), count=1)


def grouped(tensors: Sequence[Tensor], segment_of: Sequence[int], count: int | None = None) -> Segments:
    """Tensor i belongs to segment `segment_of[i]`: blocks of a model, for example."""
    if len(segment_of) != len(tensors):
        raise ValueError(f"segment_of has {len(segment_of)} entries for {len(tensors)} tensors")
    pieces = tuple((i, 0, t.numel(), s) for i, (t, s) in enumerate(zip(tensors, segment_of, strict=True)))
    return Segments(pieces, max(segment_of, default=-1) + 1 if count is None else count)


@dataclass(frozen=True)
class ChunkTable:
    """On the device. `chunks` (n, 4) int64: tensor, begin, end, segment, sorted by segment; `first` (count + 1,) int64:
    the chunks of segment s are first[s] to first[s + 1]."""

    chunks: Tensor
    first: Tensor


@functools.lru_cache(maxsize=64)
def chunk_table(pieces: tuple[int, ...], count: int, device: torch.device) -> ChunkTable:
    """The table for `Segments.flat()`; cached, since the pieces stay the same from one update to the next.

    Chunks begin at multiples of CHUNK in their tensor wherever the piece allows it.
    """
    rows = []
    for tensor, begin, end, segment in zip(*[iter(pieces)] * 4):
        while begin < end:
            cut = min(end, (begin // CHUNK + 1) * CHUNK)
            rows.append((tensor, begin, cut, segment))
            begin = cut
    rows.sort(key=lambda row: row[3])
    chunks = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)
    per_segment = torch.bincount(chunks[:, 3], minlength=count) if rows else torch.zeros(count, dtype=torch.int64)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), per_segment.cumsum(0)])
    return ChunkTable(chunks.to(device), first.to(device))
