"""Per-sample coefficients: how one number, or one number a sample, reaches a kernel or meets a (B, C, H, W) tensor.

Numbers travel as kernel arguments and tensors as pointers, so that neither costs a copy or a launch. Never in half
precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# One number, or one number per sample.
Coefficient = float | Tensor


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
    numbers: list[float] = []
    tables: list[Tensor | None] = []
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


def no_gradient(tables: Sequence[Tensor | None]) -> list[None] | None:
    """What a registered backward returns for `tables`: torch takes a list that holds nothing but tensors apart."""
    return [None] * len(tables) if all(t is not None for t in tables) else None


def kernel_arguments(numbers: Sequence[float], tables: Sequence[Tensor | None]) -> tuple[list, list[int]]:
    """The coefficients as arguments of a kernel that reads them with `coefficient`, and the kind of each."""
    arguments = [n if t is None else t.to(torch.float32) for n, t in zip(numbers, tables, strict=True)]
    return arguments, [0 if t is None else 1 if t.numel() == 1 else 2 for t in tables]


@triton.jit
def coefficient(
    source,  # a number, or a pointer to fp32, (1,) or (B,)
    b,  # sample
    KIND: tl.constexpr,  # 0: `source` is the number, 1: it points to one for all, 2: to one a sample
):
    """Coefficient of sample b in fp32."""
    if KIND == 0:
        value = source
    elif KIND == 1:
        value = tl.load(source)
    else:
        value = tl.load(source + b)
    return value
