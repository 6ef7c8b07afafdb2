"""Inner products of the unlearn and the retain gradient, per segment: what surgery decides on.

    uu_k = <u_k, u_k>     ur_k = <u_k, r_k>     rr_k = <r_k, r_k>          k = segment

u: unlearn gradient, r: retain gradient, over flat buffers and lists of tensors, each operand read once. With the second
moment v of an Adam optimizer also the same three under its preconditioner, <a, b>_P = sum a b / (sqrt(v) + eps): the
step that the optimizer takes goes along P u, so that "does not raise the retain loss" reads <P u, r> >= 0. The table is
fp64 and adds up across ranks (all-reduce it) before `surgery_coefficients`. Not here: coefficients, and any decision.

Two launches: one program a chunk writes fp32 partial sums to a slot of its own, one program per segment and column adds
them in fp64 in a fixed order. Rounding: a chunk has 256 lanes (128 with v), each adds at most 8 (16) rows of 8
products, then a tree adds the lanes: at most 32 roundings one after the other, so that the error of an entry is at most
32 eps32 / 2 = 2e-6 of the sum of its absolute products, and typically 1e-7. Squares must fit fp32: elements up to about
1e17; beyond that the entry is Inf, which skips the step. Squares below 1e-45 count as 0.

Usage: `table_S3 = surgery_dots(unlearn_grads, retain_grads, per_tensor(unlearn_grads))`
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common import backend, scratch
from fastunlearn_kernels.common.tiles import (
    TYPES,
    absmax_tile,
    block_pointer,
    chunk_length,
    chunk_row,
    is_aligned,
    retain_tile,
    typed_pointer,
)
from fastunlearn_kernels.gradients.operands import (
    Retain,
    SecondMoment,
    block_scales,
    check_blocks,
    check_floats,
    check_lists,
    check_retain,
    cut_tensors,
    in_order,
    piece_bytes,
    ranges,
    retain_range,
    unpacked,
    unpacked_moment,
)
from fastunlearn_kernels.gradients.segments import Segments, addresses, chunk_table
from fastunlearn_kernels.quantize.dynamic_code import dequantize_tile, dynamic_map, quantize_blockwise
from fastunlearn_kernels.testing.spec import AotKernel, Case, Inputs, OpSpec, Outputs
from fastunlearn_kernels.testing.specs.gradient_cases import (
    GRADIENT_CASES,
    HUGE,
    Make,
    eager_pieces,
    flat_partition,
    gradient_case,
)

# Elements of a tile: as many as 64 registers a thread allow, without and with a second moment.
ROWS, ROWS_WEIGHTED, WIDTH = 256, 128, 8
SUM_BLOCK = 4096


def surgery_dots(
    unlearn: Sequence[Tensor],
    retain: Retain,
    segments: Segments,
    *,
    second_moment: SecondMoment | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """The table (S, 3) fp64 with columns uu, ur, rr; with `second_moment` (S, 6), then the preconditioned three.

    Args:
        unlearn: gradients of one dtype; a flat partition is a list of one.
        retain: the same shapes in any float dtype, or 8-bit (`Quantized`: int8 with an absmax per 256 elements), or
            None, which gives zeros.
        segments: which elements belong to which coefficient; elements in no piece are not read.
        second_moment: v of Adam, fp32, or 8-bit as (codes, absmax). eps: Adam's.

    A value that is not finite makes its segment's entries NaN or Inf. Raises ValueError for lists that do not pair up.
    """
    codes, absmax = unpacked(retain)
    v, v_absmax = unpacked_moment(second_moment)
    check_retain(unlearn, codes, absmax)
    check_lists(unlearn, second_moment=v)
    if v_absmax:
        check_floats("second_moment codes", v, torch.uint8)
        check_blocks("second_moment", v, v_absmax)
    else:
        check_floats("second_moment", v, torch.float32, torch.float64)
    if v and not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}: where v is 0 the preconditioner would be infinite")
    if not unlearn:
        return torch.zeros((segments.count, 6 if second_moment is not None else 3), dtype=torch.float64)
    return surgery_dots_op(list(unlearn), codes, absmax, v, v_absmax, segments.flat(), segments.count, eps)


def surgery_dots_reference(
    unlearn: Sequence[Tensor], retain: Sequence[Tensor], absmax: Sequence[Tensor], second_moment: Sequence[Tensor],
    second_absmax: Sequence[Tensor], pieces: Sequence[int], segments: int, eps: float,
) -> Tensor:  # fmt: skip
    """The table in plain PyTorch, all of it in fp64. Lists as the registered op takes them: an absent one is empty."""
    cut_tensors(unlearn, pieces, segments)  # checks them
    table = torch.zeros((segments, 6 if second_moment else 3), dtype=torch.float64, device=unlearn[0].device)
    u_flat, r_flat, v_flat = ([t.reshape(-1) for t in tensors] for tensors in (unlearn, retain, second_moment))
    for i, begin, end, segment in ranges(pieces):
        u = u_flat[i][begin:end].double()
        r = torch.zeros_like(u)
        if r_flat:
            r = retain_range(r_flat[i], absmax[i] if absmax else None, begin, end, torch.float64)
        table[segment, :3] += torch.stack([u @ u, u @ r, r @ r])
        if v_flat:
            v = v_flat[i][begin:end].double()
            if second_absmax:
                v = dynamic_map(False, v.device).double()[v.long()] * block_scales(second_absmax[i], begin, end)
            weighted_u, weighted_r = u / (v.sqrt() + eps), r / (v.sqrt() + eps)
            table[segment, 3:] += torch.stack([weighted_u @ u, weighted_u @ r, weighted_r @ r])
    return table


@triton.jit
def surgery_dots_chunk_kernel(
    chunks_ptr, addresses_ptr, roots_ptr, partial_ptr, tensors, eps,
    U: tl.constexpr, R: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Stage 1, program = chunk: 3 or 6 partial sums in fp32, column c of chunk i at partial_ptr + c * chunks + i."""
    i_chunk = tl.program_id(0)
    tensor, begin, end, _ = chunk_row(chunks_ptr, i_chunk)
    # Rows of the table of addresses: u, r, absmax of r, v, absmax of v.
    u_at = tl.load(addresses_ptr + tensor)
    r_at = tl.load(addresses_ptr + tensors + tensor)
    absmax_at = tl.load(addresses_ptr + 2 * tensors + tensor)
    v_at = tl.load(addresses_ptr + 3 * tensors + tensor)
    v_absmax_at = tl.load(addresses_ptr + 4 * tensors + tensor)
    p_out = partial_ptr + i_chunk
    if is_aligned(u_at | r_at | v_at, begin, end):
        _chunk_sums(
            u_at, r_at, absmax_at, v_at, v_absmax_at, begin, end, roots_ptr, p_out, eps, U, R, V, ROWS, WIDTH, True
        )
    else:
        _chunk_sums(
            u_at, r_at, absmax_at, v_at, v_absmax_at, begin, end, roots_ptr, p_out, eps, U, R, V, ROWS, WIDTH, False
        )


@triton.jit
def _chunk_sums(
    u_at, r_at, absmax_at, v_at, v_absmax_at, begin, end, roots_ptr, p_out, eps,
    U: tl.constexpr, R: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    length = chunk_length(begin, end, ALIGNED)
    u_ptr = typed_pointer(u_at, begin, U, ALIGNED)
    r_ptr = typed_pointer(r_at, begin, R, ALIGNED)
    v_ptr = typed_pointer(v_at, begin, V, ALIGNED)
    absmax_ptr, phase = block_pointer(absmax_at, begin)
    v_absmax_ptr, _ = block_pointer(v_absmax_at, begin)
    # A row is summed at once, which stays within a thread: one accumulator a row in place of one an element.
    uu, ur, rr = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    uu_p, ur_p, rr_p = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, length, ROWS * WIDTH):
        o_row = first + tl.arange(0, ROWS) * WIDTH
        o = o_row[:, None] + tl.arange(0, WIDTH)[None, :]
        u = tl.load(u_ptr + o, mask=o < length, other=0.0).to(tl.float32)
        r = retain_tile(r_ptr, absmax_ptr, phase, o_row, o, length, R, ALIGNED)
        uu += tl.sum(u * u, 1)
        ur += tl.sum(u * r, 1)
        rr += tl.sum(r * r, 1)
        if V is not None:
            weight = 1.0 / (_root_tile(v_ptr, v_absmax_ptr, phase, roots_ptr, o_row, o, length, V, ALIGNED) + eps)
            weighted_u, weighted_r = u * weight, r * weight
            uu_p += tl.sum(weighted_u * u, 1)
            ur_p += tl.sum(weighted_u * r, 1)
            rr_p += tl.sum(weighted_r * r, 1)
    stride = tl.num_programs(0).to(tl.int64)
    tl.store(p_out, tl.sum(uu))
    tl.store(p_out + stride, tl.sum(ur))
    tl.store(p_out + 2 * stride, tl.sum(rr))
    if V is not None:
        tl.store(p_out + 3 * stride, tl.sum(uu_p))
        tl.store(p_out + 4 * stride, tl.sum(ur_p))
        tl.store(p_out + 5 * stride, tl.sum(rr_p))


@triton.jit
def _root_tile(v_ptr, absmax_ptr, phase, roots_ptr, o_row, o, length, V: tl.constexpr, ALIGNED: tl.constexpr):
    """sqrt(v) at the offsets `o` in fp32, 0 beyond `length`; of uint8 codes the roots are looked up."""
    if V == tl.uint8:  # noqa: SIM300
        code = tl.load(v_ptr + o, mask=o < length, other=0)
        root = dequantize_tile(code, roots_ptr) * tl.sqrt(absmax_tile(absmax_ptr, phase, o_row, o, length, ALIGNED))
    else:
        root = tl.sqrt(tl.load(v_ptr + o, mask=o < length, other=0.0))
    return root


@triton.jit
def surgery_dots_sum_kernel(partial_ptr, first_ptr, table_ptr, chunks, BLOCK: tl.constexpr):
    """Stage 2, program (segment, column): the partial sums of the segment's chunks, in fp64."""
    i_segment, i_column = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(first_ptr + i_segment), tl.load(first_ptr + i_segment + 1)
    p_column = partial_ptr + i_column.to(tl.int64) * chunks
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(begin, end, BLOCK):
        o_c = first + tl.arange(0, BLOCK)
        total += tl.load(p_column + o_c, mask=o_c < end, other=0.0).to(tl.float64)
    tl.store(table_ptr + i_segment * tl.num_programs(1) + i_column, tl.sum(total))


def _launch(
    unlearn: Sequence[Tensor], retain: Sequence[Tensor], absmax: Sequence[Tensor], second_moment: Sequence[Tensor],
    second_absmax: Sequence[Tensor], pieces: Sequence[int], segments: int, eps: float,
) -> Tensor:  # fmt: skip
    device, columns, key = unlearn[0].device, 6 if second_moment else 3, tuple(pieces)
    blocks = bool(absmax or second_absmax)
    u, r, v = in_order((unlearn, retain, second_moment), cut_tensors(unlearn, pieces, segments), blocks)
    chunks = chunk_table(key, segments, device)
    table = scratch.empty((segments, columns), torch.float64, device)
    partial = scratch.empty((columns, len(chunks.chunks)), torch.float32, device)
    types = [TYPES[tensors[0].dtype] if tensors else None for tensors in (u, r, v)]
    where = addresses(u, r, absmax, v, second_absmax)
    roots = _roots(device) if second_absmax else None
    with backend.on_device(u[0]):
        if len(chunks.chunks):
            rows = ROWS_WEIGHTED if v else ROWS
            surgery_dots_chunk_kernel[(len(chunks.chunks),)](
                chunks.chunks, where, roots, partial, len(u), eps, *types, ROWS=rows, WIDTH=WIDTH
            )
        if segments:
            surgery_dots_sum_kernel[(segments, columns)](
                partial, chunks.first, table, len(chunks.chunks), BLOCK=SUM_BLOCK, num_warps=8
            )
    return table


@functools.cache
def _roots(device: torch.device) -> Tensor:
    """Square roots of the unsigned dynamic map."""
    return dynamic_map(False, device).sqrt()


@torch.library.custom_op("fastunlearn::surgery_dots", mutates_args=())
def surgery_dots_op(
    unlearn: Sequence[Tensor], retain: Sequence[Tensor], absmax: Sequence[Tensor], second_moment: Sequence[Tensor],
    second_absmax: Sequence[Tensor], pieces: Sequence[int], segments: int, eps: float,
) -> Tensor:  # fmt: skip
    """As `surgery_dots_reference`; `pieces`: `Segments.flat()`. On a GPU two launches."""
    lists = (unlearn, retain, absmax, second_moment, second_absmax)
    run = _launch if backend.runs_triton([t for tensors in lists for t in tensors]) else surgery_dots_reference
    return run(*lists, pieces, segments, eps)


@surgery_dots_op.register_fake
def _fake(unlearn, retain, absmax, second_moment, second_absmax, pieces, segments, eps):
    return unlearn[0].new_empty((segments, 6 if second_moment else 3), dtype=torch.float64)


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
        packed = [quantize_blockwise(v, signed=False) for v in moments]
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
