"""The spec of `surgery_apply`."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from fastunlearn_kernels.gradients.operands import unpacked
from fastunlearn_kernels.gradients.surgery_apply import ROWS, WIDTH, surgery_apply, surgery_apply_chunk_kernel
from fastunlearn_kernels.gradients.surgery_coefficients import SurgeryPlan
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


def _written(inputs: Inputs) -> Outputs:
    return {f"unlearn[{i}]": u for i, u in enumerate(inputs["unlearn"])}


def _run(inputs: Inputs) -> Outputs:
    surgery_apply(inputs["unlearn"], inputs["retain"], inputs["segments"], inputs["plan"])
    return _written(inputs)


def _eager(inputs: Inputs) -> Outputs:
    """Piece by piece, in the dtype of u, in place; found_inf is not looked at, that would wait for the device."""
    coef_S, scale, _, _ = inputs["plan"]
    for u, r, segment in eager_pieces(inputs):
        if r is not None:
            u.sub_(coef_S[segment].to(u.dtype) * r)
        u.mul_(scale.to(u.dtype))
    return _written(inputs)


def _bytes_moved(inputs: Inputs) -> int:
    """Reads the plan on the host: r counts where coef is not 0, u where it is written."""
    coef_S, scale, found_inf, _ = (value.tolist() for value in inputs["plan"])
    codes, absmax = unpacked(inputs["retain"])
    total = 0
    for piece in inputs["segments"].pieces:
        conflicts = coef_S[piece[3]] != 0
        if found_inf == 0 and (conflicts or scale != 1):
            total += 2 * piece_bytes(inputs["unlearn"], [], piece)
            total += piece_bytes(codes, absmax, piece) if conflicts else 0
    return total


def _planned(make: Make, scale: float = 0.37, coef: float | None = None, found_inf: float = 0.0) -> Make:
    """The same gradients with a plan: coefficients of either sign, every third 0, unless all of them are `coef`."""

    def planned(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        inputs = make(draw, dtype, device)
        coef_S = torch.randn(inputs["segments"].count, generator=draw)
        coef_S[2::3] = 0.0
        if coef is not None:
            coef_S.fill_(coef)
        scalars = [torch.tensor(value, device=device) for value in (scale, found_inf, 1.0)]
        return inputs | {"plan": SurgeryPlan(coef_S.to(device), *scalars)}

    return planned


def _kernel(name: str, u: Any, r: Any) -> AotKernel:
    signature = {"chunks_ptr": "*i64", "addresses_ptr": "*i64"}
    signature |= {f"{name}_ptr": "*fp32" for name in ("coef", "scale", "found_inf")} | {"tensors": "i32"}
    constants = {"U": u, "R": r, "ROWS": ROWS, "WIDTH": WIDTH}
    signature |= dict.fromkeys(constants, "constexpr")
    return AotKernel(name, surgery_apply_chunk_kernel, signature, constants, elements=ROWS * WIDTH)


def _bench(numel: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Every segment conflicts and is clipped; repeated, u tends to a fixed point, not to 0."""
    gradients = _planned(lambda draw, dtype, device: flat_partition(numel, dtype, device), scale=0.999, coef=0.1)
    return gradients(torch.Generator(), dtype, device)


_PLAIN = gradient_case("flat, cut at odd places")

SPEC = OpSpec(
    name="surgery_apply",
    run=_run,
    eager=_eager,
    cases=(
        *[Case(c.name, _planned(c.make), c.dtypes) for c in GRADIENT_CASES if c.name != "NaN in one tensor"],
        Case("no clip", _planned(_PLAIN, scale=1.0)),
        Case("clip only", _planned(_PLAIN, coef=0.0)),
        Case("nothing to do", _planned(_PLAIN, scale=1.0, coef=0.0)),
        Case("NaN in r, coefficient 0", _planned(gradient_case("NaN in one tensor"), coef=0.0)),
        Case("NaN in r, found_inf", _planned(gradient_case("NaN in one tensor"), coef=1.0, found_inf=1.0)),
        Case("huge values", _planned(HUGE), (torch.float32, torch.bfloat16)),
    ),
    bytes_moved=_bytes_moved,
    launches=1,
    kernels=(
        _kernel("bf16, 8-bit r", tl.bfloat16, tl.int8),
        _kernel("bf16", tl.bfloat16, tl.bfloat16),
        _kernel("fp16", tl.float16, tl.float16),
        _kernel("fp32", tl.float32, tl.float32),
        _kernel("fp32, 8-bit r", tl.float32, tl.int8),
        _kernel("bf16, no r", tl.bfloat16, None),
    ),
    bench=_bench,
)
