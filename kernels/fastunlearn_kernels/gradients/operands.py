"""Lists of tensors as the parameter-space ops take them: checked, in one order of elements, retain gradient unpacked.

Host side only; the device side is `common.tiles`. Everything that depends on nothing but shapes and pieces is cached,
since both stay the same from one update to the next.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastunlearn_kernels.common.tensor_lists import same_order
from fastunlearn_kernels.common.tiles import QUANT_BLOCK
from fastunlearn_kernels.quantize.blockwise_quantize import Quantized

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Elements that the references turn into fp64 at once, so that they also serve partitions that lie in CPU memory.
REFERENCE_STEP = 1 << 24

# A quantised retain gradient is int8, a second moment in 8 bits (codes, absmax) in the unsigned dynamic map.
Retain = Sequence[Tensor] | Quantized | None
SecondMoment = Sequence[Tensor] | tuple[Sequence[Tensor], Sequence[Tensor]]


def unpacked(retain: Retain) -> tuple[list[Tensor], list[Tensor]]:
    """(tensors or codes, absmax) of a retain gradient; empty lists for what is absent."""
    if retain is None:
        return [], []
    if isinstance(retain, Quantized):
        return list(retain.codes), list(retain.absmax)
    return list(retain), []


def unpacked_moment(second_moment: SecondMoment | None) -> tuple[list[Tensor], list[Tensor]]:
    """(tensors or codes, absmax) of a second moment; empty lists for what is absent."""
    if second_moment is None:
        return [], []
    if isinstance(second_moment, tuple) and len(second_moment) == 2 and not isinstance(second_moment[0], Tensor):
        return list(second_moment[0]), list(second_moment[1])
    return [t for t in second_moment if isinstance(t, Tensor)], []


def check_retain(unlearn: Sequence[Tensor], codes: Sequence[Tensor], absmax: Sequence[Tensor]) -> None:
    """Raises ValueError unless unlearn and (unpacked) retain gradients are such that kernels can take addresses."""
    check_lists(unlearn, retain=codes)
    check_floats("unlearn", unlearn)
    if absmax:
        check_floats("retain codes", codes, torch.int8)
        check_blocks("retain", codes, absmax)
    else:
        check_floats("retain", codes)


def check_lists(unlearn: Sequence[Tensor], **others: Sequence[Tensor]) -> None:
    """Raises ValueError unless the lists pair up (an absent one is empty), each of one dtype."""
    for name, tensors in {"unlearn": unlearn, **others}.items():
        if len({t.dtype for t in tensors}) > 1:
            raise ValueError(f"{name} mixes dtypes: {', '.join(sorted({str(t.dtype) for t in tensors}))}")
        if tensors and len(tensors) != len(unlearn):
            raise ValueError(f"{name} has {len(tensors)} tensors, expected {len(unlearn)}")
        for i, (tensor, u) in enumerate(zip(tensors, unlearn)):
            if tensor.shape != u.shape:
                raise ValueError(f"{name}[{i}] has shape {tuple(tensor.shape)}, expected {tuple(u.shape)}")


def check_floats(name: str, tensors: Sequence[Tensor], *dtypes: torch.dtype) -> None:
    """Raises ValueError unless the tensors have one of the dtypes (default: any float)."""
    if tensors and tensors[0].dtype not in (dtypes or FLOATS):
        wanted = ", ".join(map(str, dtypes or FLOATS))
        raise ValueError(f"{name} has dtype {tensors[0].dtype}, expected {wanted}")


def check_blocks(name: str, tensors: Sequence[Tensor], absmax: Sequence[Tensor]) -> None:
    """Raises ValueError unless each tensor of codes has one contiguous fp32 absmax for each 256 elements."""
    if len(absmax) != len(tensors):
        raise ValueError(f"{name} has {len(tensors)} tensors of codes, but {len(absmax)} of absmax")
    for i, (tensor, scales) in enumerate(zip(tensors, absmax)):
        blocks = -(-tensor.numel() // QUANT_BLOCK)
        if scales.numel() != blocks or not scales.is_contiguous() or scales.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name}: absmax[{i}] must be contiguous float32 with {blocks} elements, "
                f"got {scales.numel()} in {scales.dtype}"
            )


def cut_tensors(unlearn: Sequence[Tensor], pieces: Sequence[int], count: int) -> frozenset[int]:
    """The tensors that are not one piece from end to end. Raises ValueError for pieces outside of their tensor or of
    the segments, and for pieces that overlap: kernels take addresses and would not notice."""
    return _cut_tensors(tuple(pieces), count, tuple(t.numel() for t in unlearn))


@functools.lru_cache(maxsize=64)
def _cut_tensors(pieces: tuple[int, ...], count: int, numels: tuple[int, ...]) -> frozenset[int]:
    ranges: dict[int, list[tuple[int, int]]] = {}
    for tensor, begin, end, segment in zip(*[iter(pieces)] * 4):
        if not 0 <= tensor < len(numels) or not 0 <= begin <= end <= numels[tensor] or not 0 <= segment < count:
            piece = (tensor, begin, end, segment)
            raise ValueError(f"piece {piece} does not fit {len(numels)} tensors and {count} segments")
        if begin < end:
            ranges.setdefault(tensor, []).append((begin, end))
    for tensor, cuts in ranges.items():
        cuts.sort()
        if any(end > begin for (_, end), (begin, _) in itertools.pairwise(cuts)):
            raise ValueError(f"two pieces of tensor {tensor} overlap")
    return frozenset(tensor for tensor, cuts in ranges.items() if cuts != [(0, numels[tensor])])


def in_order(lists: Sequence[Sequence[Tensor]], cut: frozenset[int], blocks: bool) -> list[list[Tensor]]:
    """The lists with the elements of each parameter in one common order in memory; absent lists are empty.

    Contiguous tensors are returned as they are. Other dense ones become views in the order of memory, unless the order
    counts: in tensors that are `cut`, and where blocks of 256 share a scale (`blocks`). Everything else is copied; what
    is written must then be copied back.
    """
    given = [list(tensors) for tensors in lists]
    if all(t.is_contiguous() for tensors in given for t in tensors):
        return given
    present = [tensors for tensors in given if tensors]
    for i in range(len(given[0])):
        row = [tensors[i] for tensors in present]
        if all(t.is_contiguous() for t in row):
            continue
        ordered = [t.contiguous() for t in row] if blocks or i in cut else same_order(*row)
        for tensors, t in zip(present, ordered):
            tensors[i] = t
    return given


def ranges(pieces: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """The pieces as (tensor, begin, end, segment), for the references, in ranges of at most REFERENCE_STEP elements."""
    for tensor, begin, end, segment in zip(*[iter(pieces)] * 4):
        for first in range(begin, end, REFERENCE_STEP):
            yield tensor, first, min(first + REFERENCE_STEP, end), segment


def block_scales(absmax: Tensor, begin: int, end: int) -> Tensor:
    """The absmax of each element from `begin` to `end` of a tensor that is quantised in blocks of 256."""
    blocks = absmax[begin // QUANT_BLOCK : (end - 1) // QUANT_BLOCK + 1].repeat_interleave(QUANT_BLOCK)
    return blocks[begin % QUANT_BLOCK :][: end - begin]


def retain_range(tensor: Tensor, absmax: Tensor | None, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Elements `begin` to `end` of a flat retain gradient in `dtype`: the plain form of `tiles.retain_tile`."""
    values = tensor[begin:end].to(dtype)
    return values if absmax is None else values * block_scales(absmax, begin, end).to(dtype) / 127
