"""What is declared about an op, once: tests, ahead-of-time checks, the report and the benchmarks iterate over it.

The specs are in `testing.specs`, the list of them is `testing.all_specs.ALL_SPECS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Case:
    """One set of inputs. `make(draw, dtype, device)` builds them; `draw` is a seeded generator on the CPU."""

    name: str
    make: Callable[[torch.Generator, torch.dtype, torch.device], Inputs]
    dtypes: tuple[torch.dtype, ...] = FLOATS


@dataclass(frozen=True)
class AotKernel:
    """One kernel as it is compiled ahead of time, and what the machine code must look like.

    `signature` maps argument names to Triton types ("*bf16", "i64", "fp32"), constexprs among them as "constexpr";
    `aligned` names the arguments that a launch on ordinary tensors finds divisible by 16. `vector_loads`: the PTX must
    hold `ld.global.v4` or wider (AMD: dwordx2, since a warp is twice as wide). `elements`: elements of one pass of the
    program's loop, or of the whole program if it has none, for the count of instructions an element. `max_registers`
    holds for every NVIDIA target, AMD's file is larger and is only reported.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    vector_loads: bool = True
    max_registers: int = 64
    elements: int = 0


@dataclass(frozen=True)
class OpSpec:
    """One op.

    Attributes:
        name: as registered, `fastunlearn::<name>`.
        run: call the op on a case's inputs and return every output by name, those written in place included. Inputs may
            be modified. With fp64 inputs it runs the reference: that is the oracle.
        eager: the same as a user would write it in PyTorch, in the dtype of the inputs: the competitor in accuracy and
            in the benchmark.
        gradients: inputs whose gradient is compared; `run` then returns a differentiable output named `of_gradient`.
        bytes_moved: reads and writes of a launch on these inputs if each operand is touched once.
        launches: kernels of one call.
        bench: `bench(numel, dtype, device)` makes inputs of about that many elements.
        compare: takes the place of the generic rule (twice the error of eager) where an output is a code, not a number:
            `compare(ours, oracle, eager, inputs)` raises AssertionError.
    """

    name: str
    run: Callable[[Inputs], Outputs]
    eager: Callable[[Inputs], Outputs]
    cases: tuple[Case, ...]
    bytes_moved: Callable[[Inputs], int]
    launches: int
    kernels: tuple[AotKernel, ...]
    bench: Callable[[int, torch.dtype, torch.device], Inputs]
    gradients: tuple[str, ...] = ()
    of_gradient: str = ""
    latent: bool = False
    compare: Callable[[Outputs, Outputs, Outputs, Inputs], None] | None = None
    baselines: Mapping[str, Callable[[Inputs], Any]] = field(default_factory=dict)


def copied(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Deep copy of a case's inputs that keeps strides and alignment; with `dtype`, floating tensors in that dtype.

    A tensor that appears twice stays one tensor.
    """
    seen: dict[int, Tensor] = {}
    return {name: _copied(value, dtype, seen) for name, value in inputs.items()}


def _copied(value: Any, dtype: torch.dtype | None, seen: dict[int, Tensor]) -> Any:
    if isinstance(value, (list, tuple)):
        items = [_copied(item, dtype, seen) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if not isinstance(value, Tensor):
        return value
    if id(value) not in seen:
        seen[id(value)] = _copied_tensor(value, dtype)
    return seen[id(value)]


def _copied_tensor(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
    if value.numel() == 0:
        return value.to(wanted, copy=True)
    # A view into a buffer of its own, at the same offset modulo 16 bytes, so that unaligned stays unaligned.
    shift = value.data_ptr() % 16 // value.element_size()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride()))
    buffer = torch.zeros(extent + shift, dtype=wanted, device=value.device)
    copy = buffer[shift:].as_strided(value.shape, value.stride())
    copy.copy_(value)
    return copy.requires_grad_(value.requires_grad)


def nbytes(*tensors: Tensor | list[Tensor] | None) -> int:
    """Bytes of the tensors' elements; None and empty lists count nothing."""
    flat = [t for item in tensors if item is not None for t in (item if isinstance(item, list) else [item])]
    return sum(t.numel() * t.element_size() for t in flat)


LARGE = 2**22
LAYOUTS = ("plain", "unaligned", "transposed", "strided")


def normal(
    draw: torch.Generator,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    layout: str = "plain",
    scale: float = 1.0,
) -> Tensor:
    """Random numbers in one of the layouts that a kernel must cope with.

    plain: contiguous. unaligned: contiguous, but one element past an address divisible by 16. transposed: dense, the
    last two dimensions swapped in memory. strided: every second element of a buffer.
    """
    if device.type == "cuda" and math.prod(shape) > LARGE:  # for benchmarks: the host would take minutes
        return torch.randn(tuple(shape), dtype=dtype, device=device) * scale
    values = (torch.randn(tuple(shape), generator=draw) * scale).to(dtype).to(device)
    if layout == "plain" or values.numel() == 0:
        return values
    if layout == "unaligned":
        out = torch.empty(values.numel() + 1, dtype=dtype, device=device)[1:].view(values.shape)
    elif layout == "transposed":
        out = torch.empty_like(values.mT.contiguous()).mT if values.dim() > 1 else torch.empty_like(values)
    else:
        out = torch.empty((*values.shape[:-1], 2 * values.shape[-1]), dtype=dtype, device=device)[..., ::2]
    return out.copy_(values)
