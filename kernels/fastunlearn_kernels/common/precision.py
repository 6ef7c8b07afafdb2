"""In which precision the ops compute, which shapes fit, and the sum that ends a reduction.

Every op computes in fp32, whatever comes in, and in fp64 when anything that comes in is fp64 (gradient checks,
oracles). Gradients are kept from forward to backward in that dtype too, and rounded once, after the incoming gradient
is multiplied in: in fp16, 2 / (B N) times a residual would vanish before the loss scale comes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def check_shapes(name: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError unless `tensor` has a batch dimension and the others, where present, have its shape."""
    for other, value in others.items():
        if value is not None and value.shape != tensor.shape:
            raise ValueError(f"{other} has shape {tuple(value.shape)}, {name} has {tuple(tensor.shape)}")
    if tensor.dim() < 2:
        raise ValueError(f"{name} must be (B, C, H, W), got shape {tuple(tensor.shape)}")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any of the tensors is fp64, else fp32. None counts as absent."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


@triton.jit
def ordered_sum(
    parts_ptr,  # fp32, (count,)
    count,  # how many
    BLOCK: tl.constexpr,  # how many are added at once
):
    """Sum of `count` fp32 numbers in fp64, always in the same order. They may come from other programs of this launch,
    so the read goes past the first-level cache."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        o = first + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + o, mask=o < count, other=0.0, cache_modifier=".cg").to(tl.float64)
    return tl.sum(total)
