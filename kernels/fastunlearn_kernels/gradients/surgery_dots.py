"""Inner products of the unlearn and the retain gradient, per segment: what surgery decides on.

    uu_k = <u_k, u_k>     ur_k = <u_k, r_k>     rr_k = <r_k, r_k>          k = segment

u: unlearn gradient, r: retain gradient, over flat buffers and lists of tensors, each operand read once. With the second
moment v of an Adam optimizer also the same three under its preconditioner, <a, b>_P = sum a b / (sqrt(v) + eps): the
step that the optimizer takes goes along P u, so that "does not raise the retain loss" reads <P u, r> >= 0. The table is
fp64 and adds up across ranks (all-reduce it) before `surgery_coefficients`.

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
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common import backend, scratch
from fastunlearn_kernels.common.tensor_lists import addresses
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
    ranges,
    retain_range,
    unpacked,
    unpacked_moment,
)
from fastunlearn_kernels.gradients.segments import Segments, chunk_table
from fastunlearn_kernels.quantize.dynamic_code import dequantize_tile, dynamic_map

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


class DotsOperands(NamedTuple):
    """The arguments of the registered op. Lists are as long as `unlearn`; one that is absent is empty."""

    unlearn: Sequence[Tensor]
    retain: Sequence[Tensor]  # floats, or int8 codes with ...
    absmax: Sequence[Tensor]  # ... one scale per 256 elements
    second_moment: Sequence[Tensor]  # fp32, or uint8 codes with ...
    second_absmax: Sequence[Tensor]  # ... one scale per 256 elements
    pieces: Sequence[int]  # `Segments.flat()`
    segments: int
    eps: float

    @property
    def tensors(self) -> list[Tensor]:
        return [t for tensors in self[:5] for t in tensors]


def surgery_dots_reference(given: DotsOperands) -> Tensor:
    """The table in plain PyTorch, all of it in fp64."""
    unlearn, absmax, second_absmax, eps = given.unlearn, given.absmax, given.second_absmax, given.eps
    cut_tensors(unlearn, given.pieces, given.segments)  # checks them
    columns = 6 if given.second_moment else 3
    table = torch.zeros((given.segments, columns), dtype=torch.float64, device=unlearn[0].device)
    u_flat, r_flat, v_flat = ([t.reshape(-1) for t in ts] for ts in (unlearn, given.retain, given.second_moment))
    for i, begin, end, segment in ranges(given.pieces):
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
    chunks_ptr,  # `ChunkTable.chunks`, int64, (chunks, 4)
    addresses_ptr,  # where u, r, absmax of r, v, absmax of v of each tensor begin, int64, (5, tensors)
    roots_ptr,  # square roots of the unsigned dynamic map, fp32, (256,), if V is uint8
    partial_ptr,  # sums of each chunk, fp32, (3 or 6, chunks), written
    tensors,  # number of tensors
    eps,  # of the preconditioner
    U: tl.constexpr,  # Triton type of u
    R: tl.constexpr,  # of r; int8: codes, None: absent
    V: tl.constexpr,  # of v; uint8: codes, None: absent
    ROWS: tl.constexpr,  # rows of a tile
    WIDTH: tl.constexpr,  # elements of a row
):
    """Stage 1, program = chunk: 3 or 6 partial sums in fp32."""
    i_chunk = tl.program_id(0)
    tensor, begin, end, _ = chunk_row(chunks_ptr, i_chunk)
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
    u_at, r_at, absmax_at, v_at, v_absmax_at,  # addresses of the tensor's operands, int64
    begin, end,  # the chunk's elements in the tensor, int64
    roots_ptr,  # as above
    p_out,  # where the chunk's first sum belongs; the others follow at distances of the number of chunks
    eps, U: tl.constexpr, R: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,  # as above
    ALIGNED: tl.constexpr,  # see `tiles`
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
def _root_tile(
    v_ptr,  # the chunk's first element
    absmax_ptr, phase,  # of the chunk, from `block_pointer`
    roots_ptr,  # as above
    o_row,  # offsets of the rows in the chunk, int32, (ROWS,)
    o,  # and of the elements, int32, (ROWS, WIDTH)
    length,  # elements of the chunk, int32
    V: tl.constexpr,  # as above
    ALIGNED: tl.constexpr,  # see `tiles`
):  # fmt: skip
    """sqrt(v) at the offsets `o` in fp32, 0 beyond `length`; of uint8 codes the roots are looked up."""
    if V == tl.uint8:  # noqa: SIM300
        code = tl.load(v_ptr + o, mask=o < length, other=0)
        root = dequantize_tile(code, roots_ptr) * tl.sqrt(absmax_tile(absmax_ptr, phase, o_row, o, length, ALIGNED))
    else:
        root = tl.sqrt(tl.load(v_ptr + o, mask=o < length, other=0.0))
    return root


@triton.jit
def surgery_dots_sum_kernel(
    partial_ptr,  # sums of each chunk, fp32, (3 or 6, chunks)
    first_ptr,  # `ChunkTable.first`, int64, (segments + 1,)
    table_ptr,  # fp64, (segments, 3 or 6), written
    chunks,  # number of chunks
    BLOCK: tl.constexpr,  # chunks that are added at once
):
    """Stage 2, program (segment, column): the partial sums of the segment's chunks, in fp64."""
    i_segment, i_column = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(first_ptr + i_segment), tl.load(first_ptr + i_segment + 1)
    p_column = partial_ptr + i_column.to(tl.int64) * chunks
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(begin, end, BLOCK):
        o_c = first + tl.arange(0, BLOCK)
        total += tl.load(p_column + o_c, mask=o_c < end, other=0.0).to(tl.float64)
    tl.store(table_ptr + i_segment * tl.num_programs(1) + i_column, tl.sum(total))


def _launch(given: DotsOperands) -> Tensor:
    unlearn, pieces, segments = given.unlearn, given.pieces, given.segments
    device, columns = unlearn[0].device, 6 if given.second_moment else 3
    blocks = bool(given.absmax or given.second_absmax)
    cut = cut_tensors(unlearn, pieces, segments)
    u, r, v = in_order((unlearn, given.retain, given.second_moment), cut, blocks)
    chunks = chunk_table(tuple(pieces), segments, device)
    table = scratch.empty((segments, columns), torch.float64, device)
    partial = scratch.empty((columns, len(chunks.chunks)), torch.float32, device)
    types = [TYPES[tensors[0].dtype] if tensors else None for tensors in (u, r, v)]
    where = addresses(u, r, given.absmax, v, given.second_absmax)
    roots = _roots(device) if given.second_absmax else None
    with backend.on_device(u[0]):
        if len(chunks.chunks):
            rows = ROWS_WEIGHTED if v else ROWS
            surgery_dots_chunk_kernel[(len(chunks.chunks),)](
                chunks.chunks, where, roots, partial, len(u), given.eps, *types, ROWS=rows, WIDTH=WIDTH
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
    """As `surgery_dots_reference`; on a GPU two launches."""
    given = DotsOperands(unlearn, retain, absmax, second_moment, second_absmax, pieces, segments, eps)
    return (_launch if backend.runs_triton(given.tensors) else surgery_dots_reference)(given)


@surgery_dots_op.register_fake
def _fake(unlearn, retain, absmax, second_moment, second_absmax, pieces, segments, eps):
    return unlearn[0].new_empty((segments, 6 if second_moment else 3), dtype=torch.float64)
