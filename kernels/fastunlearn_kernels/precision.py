"""In which precision the ops compute, and how per-sample coefficients meet (B, C, H, W) tensors.

Not a mixed-precision policy: that is the trainer's. Here every op computes in fp32, whatever comes in, and in fp64 when
anything that comes in is fp64 (gradient checks, oracles).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# A coefficient: one number, or one number per sample.
Coefficient = float | Tensor


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


def gradient_dtype(prediction: Tensor) -> torch.dtype:
    """In which dtype a gradient is kept from forward to backward: fp32, fp64 for fp64, so that it is rounded once, after
    the incoming gradient is multiplied in. In fp16, 2 / (B N) times a residual would vanish before the loss scale comes."""
    return compute_dtype(prediction)


def per_sample(value: Coefficient, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` (a number, a 0-d tensor or B numbers) on the device of `like`, shaped to broadcast over (B, ...).

    Raises ValueError for any other number of values, and for half-precision tables: bf16 keeps 8 bits, so that a
    coefficient near 1 loses what separates it from 1.
    """
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"coefficients must be float32 or float64, got {value.dtype}: compute them before casting")
    coefficient = torch.as_tensor(value, dtype=dtype, device=like.device).detach()
    if coefficient.numel() not in (1, like.shape[0]):
        raise ValueError(f"expected 1 or {like.shape[0]} coefficients, got {coefficient.numel()}")
    return coefficient.reshape(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True)
class Coefficients:
    """Several coefficients as a registered op takes them: a number each, and a tensor where the number does not count.

    Tensors stay on their device (no copy, no launch); one on the CPU with a single element becomes a number.
    """

    numbers: list[float]
    tables: list[Tensor | None]


def coefficients(like: Tensor, **values: Coefficient) -> Coefficients:
    """Sort coefficients for samples of `like` (B, ...) into numbers and tensors of 1 or B elements.

    Raises ValueError for another number of elements, for half precision, and for tables on another device.
    """
    numbers, tables = [], []
    for name, value in values.items():
        if not isinstance(value, Tensor):
            numbers.append(float(value))
            tables.append(None)
            continue
        if value.dtype in (torch.float16, torch.bfloat16):
            kind = f"{name}: coefficients must be float32 or float64, got {value.dtype}"
            raise ValueError(f"{kind}: compute them before casting")
        if value.numel() not in (1, like.shape[0]):
            raise ValueError(f"{name}: expected 1 or {like.shape[0]} coefficients, got {value.numel()}")
        single = value.numel() == 1 and value.device.type == "cpu"
        numbers.append(float(value) if single else 0.0)
        tables.append(None if single else value.detach().reshape(-1))
    return Coefficients(numbers, tables)


def broadcast(
    numbers: Sequence[float], tables: Sequence[Tensor | None], like: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The coefficients as tensors that broadcast over `like` (B, ...): for the reference."""
    return [per_sample(n if t is None else t, like, dtype) for n, t in zip(numbers, tables, strict=True)]


def kernel_arguments(numbers: Sequence[float], tables: Sequence[Tensor | None]) -> tuple[list, list[int]]:
    """The coefficients as arguments of a kernel that reads them with `coefficient`, and the kind of each."""
    arguments = [n if t is None else t.to(torch.float32) for n, t in zip(numbers, tables, strict=True)]
    return arguments, [0 if t is None else 1 if t.numel() == 1 else 2 for t in tables]


@triton.jit
def coefficient(source, b, KIND: tl.constexpr):
    """Coefficient of sample b in fp32. KIND 0: `source` is the number, 1: a pointer to one, 2: to one a sample."""
    if KIND == 0:
        value = source
    elif KIND == 1:
        value = tl.load(source)
    else:
        value = tl.load(source + b)
    return value


@triton.jit
def ordered_sum(parts_ptr, count, BLOCK: tl.constexpr):
    """Sum of `count` fp32 numbers in fp64, always in the same order. They may come from other programs of this launch,
    so the read goes past the first-level cache."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        o = first + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + o, mask=o < count, other=0.0, cache_modifier=".cg").to(tl.float64)
    return tl.sum(total)
