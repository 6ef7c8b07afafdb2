"""Gradient surgery in place: u <- (u - coef r) scale, per segment, with the plan that is on the device.

u: unlearn gradient (the only thing written), r: retain gradient. coef, scale and found_inf come from
`surgery_coefficients` and are read by the kernel, so that the host never waits: found_inf = 1 leaves every bit as it
is; where coef is 0, r is not read, and if scale is 1 as well, u is neither read nor written. Computed in fp32 and
rounded once, to the dtype of u. Not here: the optimizer's step; `adamw8bit_step` applies the same plan on the way.

One launch over all tensors.

Usage: `surgery_apply(unlearn_grads, retain_grads, segments, plan)`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common import backend
from fastunlearn_kernels.common.precision import compute_dtype
from fastunlearn_kernels.common.tiles import (
    TYPES,
    block_pointer,
    chunk_length,
    chunk_row,
    is_aligned,
    retain_tile,
    typed_pointer,
)
from fastunlearn_kernels.gradients.operands import (
    Retain,
    check_retain,
    cut_tensors,
    in_order,
    piece_bytes,
    ranges,
    retain_range,
    unpacked,
)
from fastunlearn_kernels.gradients.segments import Segments, addresses, chunk_table
from fastunlearn_kernels.gradients.surgery_coefficients import Plan
from fastunlearn_kernels.testing.spec import AotKernel, Case, Inputs, OpSpec, Outputs
from fastunlearn_kernels.testing.specs.gradient_cases import (
    GRADIENT_CASES,
    HUGE,
    Make,
    eager_pieces,
    flat_partition,
    gradient_case,
)

ROWS, WIDTH = 256, 8


def surgery_apply(unlearn: Sequence[Tensor], retain: Retain, segments: Segments, plan: Plan) -> None:
    """Correct the unlearn gradients in place; arguments as for `surgery_dots`.

    Elements in no piece keep every bit. Raises ValueError for lists that do not pair up or a plan of another length.
    """
    codes, absmax = unpacked(retain)
    check_retain(unlearn, codes, absmax)
    if plan.coef_S.shape != (segments.count,):
        raise ValueError(f"the plan has {tuple(plan.coef_S.shape)} coefficients for {segments.count} segments")
    if unlearn:
        coef_S, scale, found_inf, _ = plan
        surgery_apply_op(list(unlearn), codes, absmax, coef_S, scale, found_inf, segments.flat(), segments.count)


def surgery_apply_reference(
    unlearn: Sequence[Tensor], retain: Sequence[Tensor], absmax: Sequence[Tensor], coef_S: Tensor, scale: Tensor,
    found_inf: Tensor, pieces: Sequence[int], segments: int,
) -> None:  # fmt: skip
    """In place in plain PyTorch, without a branch on what is on the device. Lists as the registered op takes them."""
    cut_tensors(unlearn, pieces, segments)  # checks them
    dtype = compute_dtype(*unlearn, *retain, *absmax, coef_S, scale)
    u_flat, r_flat = ([t.reshape(-1) for t in tensors] for tensors in (unlearn, retain))
    for i, begin, end, segment in ranges(pieces):
        piece = u_flat[i][begin:end]
        u, coef = piece.to(dtype), coef_S[segment].to(dtype)
        corrected = u
        if r_flat:
            r = retain_range(r_flat[i], absmax[i] if absmax else None, begin, end, dtype)
            corrected = torch.where(coef == 0, u, u - coef * r)  # r may be anything where its coefficient is 0
        corrected = (corrected * scale).to(piece.dtype)
        untouched = (found_inf != 0) | (coef == 0) & (scale == 1)
        piece.copy_(torch.where(untouched, piece, corrected))
    for tensor, flat in zip(unlearn, u_flat):
        if tensor.numel() and flat.data_ptr() != tensor.data_ptr():  # reshape had to copy
            tensor.copy_(flat.view(tensor.shape))


@triton.jit
def surgery_apply_chunk_kernel(
    chunks_ptr, addresses_ptr, coef_ptr, scale_ptr, found_inf_ptr, tensors,
    U: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program = chunk."""
    tensor, begin, end, segment = chunk_row(chunks_ptr, tl.program_id(0))
    coef, scale, found_inf = tl.load(coef_ptr + segment), tl.load(scale_ptr), tl.load(found_inf_ptr)
    if (found_inf == 0) & ((coef != 0) | (scale != 1)):
        # Rows of the table of addresses: u, r, absmax of r.
        u_at = tl.load(addresses_ptr + tensor)
        r_at = tl.load(addresses_ptr + tensors + tensor)
        absmax_at = tl.load(addresses_ptr + 2 * tensors + tensor)
        if is_aligned(u_at | r_at, begin, end):
            _correct_chunk(u_at, r_at, absmax_at, begin, end, coef, scale, U, R, ROWS, WIDTH, True)
        else:
            _correct_chunk(u_at, r_at, absmax_at, begin, end, coef, scale, U, R, ROWS, WIDTH, False)


@triton.jit
def _correct_chunk(
    u_at, r_at, absmax_at, begin, end, coef, scale,
    U: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    length = chunk_length(begin, end, ALIGNED)
    u_ptr = typed_pointer(u_at, begin, U, ALIGNED)
    r_ptr = typed_pointer(r_at, begin, R, ALIGNED)
    absmax_ptr, phase = block_pointer(absmax_at, begin)
    # Where coef is 0 every load of r is masked: r = 0 without a byte read.
    r_length = tl.where(coef != 0, length, 0)
    if ALIGNED:
        r_length = tl.multiple_of(r_length, 16)
    for first in range(0, length, ROWS * WIDTH):
        o_row = first + tl.arange(0, ROWS) * WIDTH
        o = o_row[:, None] + tl.arange(0, WIDTH)[None, :]
        u = tl.load(u_ptr + o, mask=o < length, other=0.0).to(tl.float32)
        r = retain_tile(r_ptr, absmax_ptr, phase, o_row, o, r_length, R, ALIGNED)
        corrected = (u - coef * r) * scale
        tl.store(u_ptr + o, corrected.to(U), mask=o < length)


def _launch(
    unlearn: Sequence[Tensor], retain: Sequence[Tensor], absmax: Sequence[Tensor], coef_S: Tensor, scale: Tensor,
    found_inf: Tensor, pieces: Sequence[int], segments: int,
) -> None:  # fmt: skip
    device, key = unlearn[0].device, tuple(pieces)
    u, r = in_order((unlearn, retain), cut_tensors(unlearn, pieces, segments), bool(absmax))
    chunks = chunk_table(key, segments, device)
    if not len(chunks.chunks):
        return
    types = [TYPES[tensors[0].dtype] if tensors else None for tensors in (u, r)]
    where = addresses(u, r, absmax)
    with backend.on_device(u[0]):
        surgery_apply_chunk_kernel[(len(chunks.chunks),)](
            chunks.chunks, where, coef_S.contiguous(), scale, found_inf, len(u), *types, ROWS=ROWS, WIDTH=WIDTH
        )
    for tensor, ordered in zip(unlearn, u):
        if tensor.numel() and ordered.data_ptr() != tensor.data_ptr():  # the kernel worked on a copy
            tensor.copy_(ordered.view(tensor.shape))


@torch.library.custom_op("fastunlearn::surgery_apply", mutates_args=("unlearn",))
def surgery_apply_op(
    unlearn: Sequence[Tensor], retain: Sequence[Tensor], absmax: Sequence[Tensor], coef_S: Tensor, scale: Tensor,
    found_inf: Tensor, pieces: Sequence[int], segments: int,
) -> None:  # fmt: skip
    """As `surgery_apply_reference`; on a GPU one launch."""
    plan = (coef_S, scale, found_inf)
    run = _launch if backend.runs_triton([*unlearn, *retain, *absmax, *plan]) else surgery_apply_reference
    run(unlearn, retain, absmax, *plan, pieces, segments)


@surgery_apply_op.register_fake
def _fake(unlearn, retain, absmax, coef_S, scale, found_inf, pieces, segments):
    return None


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
        return inputs | {"plan": Plan(coef_S.to(device), *scalars)}

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
