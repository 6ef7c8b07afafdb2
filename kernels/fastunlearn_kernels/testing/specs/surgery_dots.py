"""The spec of `surgery_dots`."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.gradients.operands import unpacked, unpacked_moment
from fastunlearn_kernels.gradients.surgery_dots import (
    ROWS,
    ROWS_WEIGHTED,
    SUM_BLOCK,
    WIDTH,
    surgery_dots,
    surgery_dots_chunk_kernel,
    surgery_dots_sum_kernel,
)
from fastunlearn_kernels.quantize.dynamic_code import quantize_dynamic
from fastunlearn_kernels.testing.common.gradient_cases import (
    GRADIENT_CASES,
    HUGE,
    Make,
    eager_pieces,
    flat_partition,
    gradient_case,
    piece_bytes,
)
from fastunlearn_kernels.testing.common.spec import AotKernel, Case, Inputs, OpSpec, Outputs


def _run(inputs: Inputs) -> Outputs:
    table = surgery_dots(**inputs)
    # By column, since mixed products may be small beside the squares.
    names = ("uu", "ur", "rr", "preconditioned uu", "preconditioned ur", "preconditioned rr")
    return dict(zip(names, table.t().contiguous()))


def _eager(inputs: Inputs) -> Outputs:
    """A dot product each, in the dtype of u; plain only."""
    if inputs.get("second_moment") is not None:
        return {}
    table = torch.zeros((inputs["segments"].count, 3), dtype=torch.float64)
    for u, r, segment in eager_pieces(inputs):
        r = torch.zeros_like(u) if r is None else r
        products = torch.stack([torch.dot(u, u), torch.dot(u, r), torch.dot(r, r)])
        table = table.to(u.device)
        table[segment] += products
    return dict(zip(("uu", "ur", "rr"), table.unbind(1)))


def _bytes_moved(inputs: Inputs) -> int:
    codes, absmax = unpacked(inputs["retain"])
    v, v_absmax = unpacked_moment(inputs.get("second_moment"))
    lists = ((list(inputs["unlearn"]), list[Tensor]()), (codes, absmax), (v, v_absmax))
    return sum(piece_bytes(tensors, scales, inputs["segments"].flat()) for tensors, scales in lists)


def _with_moment(make: Make, eight_bit: bool) -> Make:
    """The same gradients with a second moment that spans six decades, zeros among it."""

    def weighted(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        inputs = make(draw, dtype, device)
        moments = []
        for u in inputs["unlearn"]:
            v = 10 ** (-6 * torch.rand(u.shape, generator=draw)) * (torch.rand(u.shape, generator=draw) > 0.1)
            moments.append(torch.empty_like(u, dtype=torch.float32).copy_(v))
        packed = [quantize_dynamic(v, signed=False) for v in moments]
        second = ([codes for codes, _ in packed], [absmax for _, absmax in packed]) if eight_bit else moments
        return inputs | {"second_moment": second, "eps": 1e-3}

    return weighted


def _kernel(name: str, u: Any, r: Any, v: Any = None) -> AotKernel:
    signature = {"chunks_ptr": "*i64", "addresses_ptr": "*i64", "roots_ptr": "*fp32", "partial_ptr": "*fp32"}
    signature |= {"tensors": "i32", "eps": "fp32"}
    rows = ROWS if v is None else ROWS_WEIGHTED
    constants: dict[str, Any] = {"U": u, "R": r, "V": v, "ROWS": rows, "WIDTH": WIDTH}
    if v != tl.uint8:
        constants["roots_ptr"] = None
    signature |= dict.fromkeys(constants, "constexpr")
    return AotKernel(name, surgery_dots_chunk_kernel, signature, constants, elements=rows * WIDTH)


_SUM = {"partial_ptr": "*fp32", "first_ptr": "*i64", "table_ptr": "*fp64", "chunks": "i32", "BLOCK": "constexpr"}
_WEIGHTED = ("1 element", "63 elements", "8-bit retain", "fp32 retain", "no retain", "unaligned", "strided")

SPEC = OpSpec(
    name="surgery_dots",
    run=_run,
    eager=_eager,
    cases=(
        *GRADIENT_CASES,
        Case("huge values", HUGE, (torch.float32, torch.bfloat16)),
        *[Case(f"{name}, v", _with_moment(gradient_case(name), False)) for name in _WEIGHTED],
        *[Case(f"{name}, 8-bit v", _with_moment(gradient_case(name), True)) for name in _WEIGHTED],
        Case("flat, cut, v", _with_moment(gradient_case("flat, cut, 8-bit retain"), False), (torch.float32,)),
        Case("flat, cut, 8-bit v", _with_moment(gradient_case("flat, cut, 8-bit retain"), True), (torch.bfloat16,)),
    ),
    bytes_moved=_bytes_moved,
    launches=2,
    kernels=(
        _kernel("bf16, 8-bit r", tl.bfloat16, tl.int8),
        _kernel("bf16", tl.bfloat16, tl.bfloat16),
        _kernel("fp16", tl.float16, tl.float16),
        _kernel("fp32", tl.float32, tl.float32),
        _kernel("fp32, 8-bit r", tl.float32, tl.int8),
        _kernel("fp32, v", tl.float32, tl.float32, tl.float32),
        _kernel("bf16, 8-bit r, v", tl.bfloat16, tl.int8, tl.float32),
        _kernel("bf16, 8-bit r, 8-bit v", tl.bfloat16, tl.int8, tl.uint8),
        AotKernel("sum", surgery_dots_sum_kernel, _SUM, {"BLOCK": SUM_BLOCK}, num_warps=8, vector_loads=False),
    ),
    bench=flat_partition,
    baselines={
        "torch._foreach_norm, norms only": lambda inputs: torch._foreach_norm([u for u, _, _ in eager_pieces(inputs)]),
    },
)
