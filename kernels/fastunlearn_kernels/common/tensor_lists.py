"""Lists of tensors as kernels see them: by their addresses, each parameter's operands in one order of elements.

Host side only. How a list is cut for programs is in `gradients.segments` and `quantize.block_chunks`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

# Elements of one program. A multiple of 256, so that 8-bit blocks are never cut by a chunk of an uncut tensor; small
# enough for about 20 waves over a large GPU at 341 M elements, so that the last, partial wave costs little.
CHUNK = 16384


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
