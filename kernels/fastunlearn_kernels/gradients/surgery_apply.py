"""Gradient surgery in place: u <- (u - coef r) scale, per segment, with the plan that is on the device.

u: unlearn gradient (the only thing written), r: retain gradient. coef, scale and found_inf come from
`surgery_coefficients` and are read by the kernel, so that the host never waits: found_inf = 1 leaves every bit as it
is; where coef is 0, r is not read, and if scale is 1 as well, u is neither read nor written. Computed in fp32 and
rounded once, to the dtype of u. `adamw8bit_step` applies the same plan on the way.

One launch over all tensors.

Usage: `surgery_apply(unlearn_grads, retain_grads, segments, plan)`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common import backend
from fastunlearn_kernels.common.precision import compute_dtype
from fastunlearn_kernels.common.tensor_lists import addresses
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
    ranges,
    retain_range,
    unpacked,
)
from fastunlearn_kernels.gradients.segments import Segments, chunk_table
from fastunlearn_kernels.gradients.surgery_coefficients import SurgeryPlan

ROWS, WIDTH = 256, 8


def surgery_apply(unlearn: Sequence[Tensor], retain: Retain, segments: Segments, plan: SurgeryPlan) -> None:
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


class ApplyOperands(NamedTuple):
    """The arguments of the registered op. Lists are as long as `unlearn`; one that is absent is empty."""

    unlearn: Sequence[Tensor]  # written
    retain: Sequence[Tensor]  # floats, or int8 codes with ...
    absmax: Sequence[Tensor]  # ... one scale per 256 elements
    coef_S: Tensor  # of the plan, as the next two
    scale: Tensor
    found_inf: Tensor
    pieces: Sequence[int]  # `Segments.flat()`
    segments: int


def surgery_apply_reference(given: ApplyOperands) -> None:
    """In place in plain PyTorch, without a branch on what is on the device."""
    unlearn, absmax, coef_S, scale = given.unlearn, given.absmax, given.coef_S, given.scale
    cut_tensors(unlearn, given.pieces, given.segments)  # checks them
    dtype = compute_dtype(*unlearn, *given.retain, *absmax, coef_S, scale)
    u_flat, r_flat = ([t.reshape(-1) for t in tensors] for tensors in (unlearn, given.retain))
    for i, begin, end, segment in ranges(given.pieces):
        piece = u_flat[i][begin:end]
        u, coef = piece.to(dtype), coef_S[segment].to(dtype)
        corrected = u
        if r_flat:
            r = retain_range(r_flat[i], absmax[i] if absmax else None, begin, end, dtype)
            corrected = torch.where(coef == 0, u, u - coef * r)  # r may be anything where its coefficient is 0
        corrected = (corrected * scale).to(piece.dtype)
        untouched = (given.found_inf != 0) | (coef == 0) & (scale == 1)
        piece.copy_(torch.where(untouched, piece, corrected))
    for tensor, flat in zip(unlearn, u_flat):
        if tensor.numel() and flat.data_ptr() != tensor.data_ptr():  # reshape had to copy
            tensor.copy_(flat.view(tensor.shape))


@triton.jit
def surgery_apply_chunk_kernel(
    chunks_ptr,  # `ChunkTable.chunks`, int64, (chunks, 4)
    addresses_ptr,  # where u, r, absmax of r of each tensor begin, int64, (3, tensors); u is written
    coef_ptr,  # fp32, (segments,)
    scale_ptr,  # fp32, (1,)
    found_inf_ptr,  # fp32, (1,); 1: nothing is done
    tensors,  # number of tensors
    U: tl.constexpr,  # Triton type of u
    R: tl.constexpr,  # of r; int8: codes, None: absent
    ROWS: tl.constexpr,  # rows of a tile
    WIDTH: tl.constexpr,  # elements of a row
):
    """Program = chunk."""
    tensor, begin, end, segment = chunk_row(chunks_ptr, tl.program_id(0))
    coef, scale, found_inf = tl.load(coef_ptr + segment), tl.load(scale_ptr), tl.load(found_inf_ptr)
    if (found_inf == 0) & ((coef != 0) | (scale != 1)):
        u_at = tl.load(addresses_ptr + tensor)
        r_at = tl.load(addresses_ptr + tensors + tensor)
        absmax_at = tl.load(addresses_ptr + 2 * tensors + tensor)
        if is_aligned(u_at | r_at, begin, end):
            _correct_chunk(u_at, r_at, absmax_at, begin, end, coef, scale, U, R, ROWS, WIDTH, True)
        else:
            _correct_chunk(u_at, r_at, absmax_at, begin, end, coef, scale, U, R, ROWS, WIDTH, False)


@triton.jit
def _correct_chunk(
    u_at, r_at, absmax_at,  # addresses of the tensor's operands, int64
    begin, end,  # the chunk's elements in the tensor, int64
    coef, scale,  # of the chunk's segment, fp32
    U: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,  # as above
    ALIGNED: tl.constexpr,  # see `tiles`
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


def _launch(given: ApplyOperands) -> None:
    unlearn, pieces, segments = given.unlearn, given.pieces, given.segments
    u, r = in_order((unlearn, given.retain), cut_tensors(unlearn, pieces, segments), bool(given.absmax))
    chunks = chunk_table(tuple(pieces), segments, unlearn[0].device)
    if not len(chunks.chunks):
        return
    types = [TYPES[tensors[0].dtype] if tensors else None for tensors in (u, r)]
    where = addresses(u, r, given.absmax)
    with backend.on_device(u[0]):
        surgery_apply_chunk_kernel[(len(chunks.chunks),)](
            chunks.chunks, where, given.coef_S.contiguous(), given.scale, given.found_inf, len(u), *types,
            ROWS=ROWS, WIDTH=WIDTH,
        )  # fmt: skip
    for tensor, ordered in zip(unlearn, u):
        if tensor.numel() and ordered.data_ptr() != tensor.data_ptr():  # the kernel worked on a copy
            tensor.copy_(ordered.view(tensor.shape))


@torch.library.custom_op("fastunlearn::surgery_apply", mutates_args=("unlearn",))
def surgery_apply_op(
    unlearn: Sequence[Tensor], retain: Sequence[Tensor], absmax: Sequence[Tensor], coef_S: Tensor, scale: Tensor,
    found_inf: Tensor, pieces: Sequence[int], segments: int,
) -> None:  # fmt: skip
    """As `surgery_apply_reference`; on a GPU one launch."""
    given = ApplyOperands(unlearn, retain, absmax, coef_S, scale, found_inf, pieces, segments)
    on_gpu = backend.runs_triton([*unlearn, *retain, *absmax, coef_S, scale, found_inf])
    (_launch if on_gpu else surgery_apply_reference)(given)


@surgery_apply_op.register_fake
def _fake(unlearn, retain, absmax, coef_S, scale, found_inf, pieces, segments):
    return None
