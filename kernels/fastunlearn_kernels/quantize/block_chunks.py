"""Tensors cut into chunks of whole 256-element blocks, for the ops that keep 8-bit codes with one absmax a block.

Blocks are counted from the first element of each tensor, in logical order, and so are never shared by two programs.
Every element of a list has a number, unique in the list, from which random bits for rounding are made: tensors begin at
multiples of 256. Host side only. Chunks by segment, which may cut blocks, are those of `gradients.segments`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastunlearn_kernels.common.tensor_lists import CHUNK
from fastunlearn_kernels.common.tiles import QUANT_BLOCK


def first_elements(numels: Sequence[int]) -> list[int]:
    """The number of the first element of each tensor, and behind the last tensor the next free one."""
    firsts = [0]
    for numel in numels:
        firsts.append(firsts[-1] + -(-numel // QUANT_BLOCK) * QUANT_BLOCK)
    return firsts


@functools.lru_cache(maxsize=64)
def block_chunks(numels: tuple[int, ...], device: torch.device) -> Tensor:
    """(chunks, 4) int64 on the device: tensor, begin, end, number of the tensor's first element. Cached."""
    firsts = first_elements(numels)
    rows = [
        (i, begin, min(begin + CHUNK, numel), firsts[i])
        for i, numel in enumerate(numels)
        for begin in range(0, numel, CHUNK)
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).to(device)


@functools.lru_cache(maxsize=64)
def block_chunks_of_pieces(
    numels: tuple[int, ...], pieces: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Chunks that know their segments: (chunks, 6) int64 and (pieces, 3) int64, on the device. Cached.

    A chunk is (tensor, begin, end, number of the tensor's first element, first piece, kind), a piece (begin, end,
    segment), sorted by tensor and place. kind 0: no piece touches the chunk. 1: the first piece covers it. n + 1: n
    pieces lie in it, each somewhere; these are the blocks that the border of a piece cuts.
    """
    of_tensor: dict[int, list[tuple[int, int, int]]] = {}
    for tensor, begin, end, segment in zip(*[iter(pieces)] * 4):
        if begin < end:
            of_tensor.setdefault(tensor, []).append((begin, end, segment))
    rows: list[tuple[int, ...]] = []
    table: list[tuple[int, ...]] = []
    firsts = first_elements(numels)
    for i, numel in enumerate(numels):
        cuts = sorted(of_tensor.get(i, []))
        table_start = len(table)
        table += cuts
        edges = {edge for cut in cuts for edge in cut[:2]}
        around = {min(edge + shift, numel) for edge in edges for shift in (-(edge % QUANT_BLOCK), -edge % QUANT_BLOCK)}
        borders = sorted(around | set(range(0, numel, CHUNK)) | {numel})
        first = 0
        for begin, end in itertools.pairwise(borders):
            while first < len(cuts) and cuts[first][1] <= begin:
                first += 1
            last = first
            while last < len(cuts) and cuts[last][0] < end:
                last += 1
            covered = last - first == 1 and cuts[first][0] <= begin and end <= cuts[first][1]
            kind = last - first if covered or last == first else last - first + 1
            rows.append((i, begin, end, firsts[i], table_start + first, kind))
    tables = [torch.tensor(t, dtype=torch.int64).reshape(-1, n).to(device) for t, n in ((rows, 6), (table, 3))]
    return tables[0], tables[1]


def views(flat: Tensor, shapes: Sequence[Sequence[int]], numels: Sequence[int]) -> list[Tensor]:
    """Tensors of the shapes, laid out one after the other in `flat` at their first numbers."""
    firsts = first_elements(numels)
    return [flat[first : first + numel].view(tuple(shape)) for first, numel, shape in zip(firsts, numels, shapes)]
