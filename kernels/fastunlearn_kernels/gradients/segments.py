"""How tensors are cut: into pieces that belong to one segment each, and pieces into chunks for one program each.

A segment is what gets one coefficient: a tensor, a block of the model, everything, or a range of a flat ZeRO partition.
A piece is (tensor, begin, end, segment), in elements. The tables that kernels read are built here: chunk -> (tensor,
begin, end, segment), and the addresses of the tensors. Not here: kernels, and the coefficients.

Usage: `segments = per_tensor(grads)`; `segments = of_flat([0, 1280, 4096])`; `segments = whole(grads)`
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of one program. A multiple of 256, so that 8-bit blocks are never cut by a chunk of an uncut tensor; small
# enough for about 20 waves over a large GPU at 341 M elements, so that the last, partial wave costs little.
CHUNK = 16384


@dataclass(frozen=True)
class Segments:
    """`pieces`: (tensor, begin, end, segment), elements, in any order; `count`: number of segments."""

    pieces: tuple[tuple[int, int, int, int], ...]
    count: int

    def flat(self) -> list[int]:
        """The pieces as one list of integers, as registered ops take them."""
        return [number for piece in self.pieces for number in piece]


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


def of_flat(boundaries: Sequence[int], segment_of: Sequence[int] | None = None) -> Segments:
    """One flat buffer cut at `boundaries` (first 0, ascending, last its size or less: padding belongs to nobody)."""
    if list(boundaries) != sorted(boundaries) or (boundaries and boundaries[0] < 0):
        raise ValueError("boundaries must ascend from 0")
    ranges = list(itertools.pairwise(boundaries))
    names = range(len(ranges)) if segment_of is None else segment_of
    pieces = tuple((0, begin, end, s) for (begin, end), s in zip(ranges, names, strict=True))
    return Segments(pieces, max(names, default=-1) + 1)


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


def addresses(*lists: Sequence[Tensor] | None) -> Tensor:
    """(number of lists, number of tensors) int64 on the device: where each tensor begins. An absent list gives zeros.

    One small copy, from pinned memory on a GPU, so that the host does not wait; none where the addresses are those of
    an earlier call. So a launch that was made once before can be captured in a CUDA graph: the copy is not in it.
    """
    present = next(tensors for tensors in lists if tensors)
    rows = tuple(tuple(t.data_ptr() for t in tensors) if tensors else (0,) * len(present) for tensors in lists)
    return _address_table(rows, present[0].device)


@functools.lru_cache(maxsize=256)
def _address_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def flat_view(tensor: Tensor) -> Tensor | None:
    """The elements in the order in which they lie in memory, as a view; None if there are gaps or overlaps.

    Channels-last convolution weights and transposed matrices are dense too: what an op does to each element does not
    depend on the order, as long as all its operands share it.
    """
    if tensor.is_contiguous():
        return tensor.reshape(-1)
    dense = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1)
    expected = 1
    for stride, size in dense:
        if stride != expected:
            return None
        expected *= size
    return tensor.as_strided((tensor.numel(),), (1,))


def same_order(*tensors: Tensor) -> list[Tensor]:
    """Operands of one parameter as 1-d tensors in one common order of elements: views where their strides agree and
    leave no gaps, else contiguous copies (write those back with `copy_`)."""
    views = [flat_view(t) for t in tensors]
    if all(v is not None for v in views) and len({_order(t) for t in tensors}) == 1:
        return [v for v in views if v is not None]
    return [t.contiguous().reshape(-1) for t in tensors]


def _order(tensor: Tensor) -> tuple:
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1) if tensor.dim() > 1 else ()
