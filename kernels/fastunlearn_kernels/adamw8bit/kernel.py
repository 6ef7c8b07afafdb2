"""The Triton kernel of `adamw8bit_step`, which has the formulas: surgery, clipping and AdamW in one pass.

A chunk consists of whole blocks of 256, so that each absmax is the maximum of a row of the tile (ROWS, 256). It runs
with 16-byte loads and one coefficient if all addresses and its end are divisible by 16 and one segment covers it;
else, element by element, in the second copy of the loop. The number format is `quantize.dynamic_code`'s, the launcher
is in `step`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastunlearn_kernels.common.rounding import rounding_halves_tile, to_bf16_stochastic_tile
from fastunlearn_kernels.common.tiles import block_pointer, chunk_length, is_aligned, retain_tile, typed_pointer
from fastunlearn_kernels.quantize.dynamic_code import dequantize_tile, inverse_absmax, quantize_tile

_ZERO_CODE = tl.constexpr(127)  # of 0 in the signed map; in the unsigned one it is 0


@triton.jit
def adamw8bit_step_chunk_kernel(
    chunks_ptr,  # table of `block_chunks_of_pieces`: tensor, begin, end, element, first piece, kind; int64, (chunks, 6)
    pieces_ptr,  # its pieces: begin, end, segment; int64, (pieces, 3)
    addresses_ptr,  # where p, copy, u, r, its absmax, m, v, their absmax begin, int64, (9, tensors); u, r are read only
    map1_ptr,  # values of the signed dynamic map, fp32, (256,)
    map2_ptr,  # and of the unsigned one
    coef_ptr,  # of the plan, fp32, (segments,), if PLAN
    scale_ptr,  # fp32, (1,), if PLAN
    found_inf_ptr,  # fp32, (1,), if PLAN; 1: nothing is done
    tensors,  # number of tensors
    beta1,  # decay of the first moment
    one_minus_beta1,  # 1 - beta1, computed in fp64
    beta2,  # decay of the second moment
    one_minus_beta2,  # 1 - beta2, computed in fp64
    eps,  # added to the root of the second moment
    decay,  # 1 - lr weight_decay
    step_size,  # lr / (1 - beta1^t)
    inv_sqrt_bias2,  # 1 / sqrt(1 - beta2^t)
    seed,  # of the random bits, an integer
    P: tl.constexpr,  # Triton type of the parameters
    C: tl.constexpr,  # of their copies; None: there are none
    U: tl.constexpr,  # of the gradients
    R: tl.constexpr,  # of the retain gradients; int8: codes, None: absent
    S: tl.constexpr,  # of the moments; uint8: codes, else fp32
    PLAN: tl.constexpr,  # whether there is surgery or clipping
    STOCHASTIC: tl.constexpr,  # whether parameters, bf16, are rounded stochastically
    ROWS: tl.constexpr,  # blocks of a tile
    WIDTH: tl.constexpr,  # elements of a block
):
    """Program = chunk of whole blocks."""
    found_inf = 0.0
    if PLAN:
        found_inf = tl.load(found_inf_ptr)
    if found_inf == 0:
        row_ptr = chunks_ptr + tl.program_id(0).to(tl.int64) * 6
        at_ptr = addresses_ptr + tl.load(row_ptr)
        begin, end, kind = tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 5)
        together = tl.load(at_ptr) | tl.load(at_ptr + tensors) | tl.load(at_ptr + 2 * tensors)
        together |= tl.load(at_ptr + 3 * tensors) | tl.load(at_ptr + 5 * tensors) | tl.load(at_ptr + 6 * tensors)
        if is_aligned(together, begin, end) & (kind <= 1):
            _step_chunk(
                row_ptr, pieces_ptr, at_ptr, map1_ptr, map2_ptr, coef_ptr, scale_ptr, tensors,
                beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, inv_sqrt_bias2, seed,
                P, C, U, R, S, PLAN, STOCHASTIC, ROWS, WIDTH, True,
            )  # fmt: skip
        else:  # in smaller tiles, or this copy would need most registers
            _step_chunk(
                row_ptr, pieces_ptr, at_ptr, map1_ptr, map2_ptr, coef_ptr, scale_ptr, tensors,
                beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, inv_sqrt_bias2, seed,
                P, C, U, R, S, PLAN, STOCHASTIC, ROWS // 4, WIDTH, False,
            )  # fmt: skip


@triton.jit
def _step_chunk(
    row_ptr,  # the chunk's row in chunks_ptr
    pieces_ptr,  # as above
    at_ptr,  # the tensor's column in the table of addresses
    map1_ptr, map2_ptr, coef_ptr, scale_ptr, tensors,  # as above
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, inv_sqrt_bias2, seed,  # as above
    P: tl.constexpr, C: tl.constexpr, U: tl.constexpr, R: tl.constexpr, S: tl.constexpr,  # as above
    PLAN: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,  # as above
    ALIGNED: tl.constexpr,  # see `tiles`
):  # fmt: skip
    CODED: tl.constexpr = tl.float32 != S
    begin, end, element = tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    length = chunk_length(begin, end, ALIGNED)
    element += begin  # the chunk's first one
    p_ptr = typed_pointer(tl.load(at_ptr), begin, P, ALIGNED)
    c_ptr = typed_pointer(tl.load(at_ptr + tensors), begin, C, ALIGNED)
    u_ptr = typed_pointer(tl.load(at_ptr + 2 * tensors), begin, U, ALIGNED)
    r_ptr = typed_pointer(tl.load(at_ptr + 3 * tensors), begin, R, ALIGNED)
    m_ptr = typed_pointer(tl.load(at_ptr + 5 * tensors), begin, S, ALIGNED)
    v_ptr = typed_pointer(tl.load(at_ptr + 6 * tensors), begin, S, ALIGNED)
    rs_ptr, _ = block_pointer(tl.load(at_ptr + 4 * tensors), begin)
    ms_ptr, _ = block_pointer(tl.load(at_ptr + 7 * tensors), begin)
    vs_ptr, _ = block_pointer(tl.load(at_ptr + 8 * tensors), begin)
    coef, scale, pieces, r_length = 0.0, 1.0, 0, length
    if PLAN:
        pieces_ptr += tl.load(row_ptr + 4) * 3
        kind = tl.load(row_ptr + 5)
        pieces = (kind - 1).to(tl.int32)
        if kind == 1:
            coef, scale = tl.load(coef_ptr + tl.load(pieces_ptr + 2)), tl.load(scale_ptr)
        if ALIGNED:
            # Where coef is 0 every load of r is masked: r = 0 without a byte read.
            r_length = tl.multiple_of(tl.where(coef != 0, length, 0), 16)
    for first in range(0, length, ROWS * WIDTH):
        o_row = first + tl.arange(0, ROWS) * WIDTH
        o = o_row[:, None] + tl.arange(0, WIDTH)[None, :]
        mask, row_mask, o_block = o < length, o_row < length, o_row >> 8
        g = tl.load(u_ptr + o, mask=mask, other=0.0).to(tl.float32)
        if PLAN:
            if ALIGNED:
                if R is not None:
                    g = g - coef * retain_tile(r_ptr, rs_ptr, 0, o_row, o, r_length, R, True)
                g = g * scale
            else:
                r = retain_tile(r_ptr, rs_ptr, 0, o_row, o, r_length, R, False)
                g = _corrected(g, r, begin + o, coef, scale, pieces_ptr, pieces, coef_ptr, scale_ptr)
        if CODED:
            # Lanes beyond the end hold the codes of 0, so that they do not count for absmax.
            code1 = tl.load(m_ptr + o, mask=mask, other=_ZERO_CODE)
            code2 = tl.load(v_ptr + o, mask=mask, other=0)
            old1 = tl.load(ms_ptr + o_block, mask=row_mask, other=0.0) * beta1
            old2 = tl.load(vs_ptr + o_block, mask=row_mask, other=0.0) * beta2
            m = dequantize_tile(code1, map1_ptr) * old1[:, None] + g * one_minus_beta1
            v = dequantize_tile(code2, map2_ptr) * old2[:, None] + (g * one_minus_beta2) * g
        else:
            m = tl.load(m_ptr + o, mask=mask, other=0.0) * beta1 + g * one_minus_beta1
            v = tl.load(v_ptr + o, mask=mask, other=0.0) * beta2 + (g * one_minus_beta2) * g
        p = tl.load(p_ptr + o, mask=mask, other=0.0).to(tl.float32)
        # 1 / x as rsqrt(x)^2: two instructions on NVIDIA, where a division takes eight.
        inverse = tl.rsqrt(tl.sqrt(v) * inv_sqrt_bias2 + eps)
        p = p * decay - (m * step_size) * inverse * inverse
        if STOCHASTIC:
            # A seed of 1 is a constant, which has no methods.
            halves = rounding_halves_tile(element * 0 + seed, element + o_row, WIDTH)
            tl.store(p_ptr + o, to_bf16_stochastic_tile(p, halves), mask=mask)
        else:
            tl.store(p_ptr + o, p.to(P), mask=mask)
        if C is not None:
            tl.store(c_ptr + o, p.to(C), mask=mask)
        if CODED:
            # As integers, so that NaN counts as the largest; whatever is wrong with m is wrong with v as well.
            new2 = tl.max(tl.abs(v).to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
            new1 = tl.max(tl.abs(m), axis=1)
            code1 = quantize_tile(m, inverse_absmax(new1)[:, None], True)
            code2 = quantize_tile(v, inverse_absmax(new2)[:, None], False)
            tl.store(m_ptr + o, code1, mask=mask)
            tl.store(v_ptr + o, code2, mask=mask)
            nan = (new1 - new1) + (new2 - new2)  # 0 if both are finite
            tl.store(ms_ptr + o_block, new1 + nan, mask=row_mask)
            tl.store(vs_ptr + o_block, new2 + nan, mask=row_mask)
        else:
            tl.store(m_ptr + o, m, mask=mask)
            tl.store(v_ptr + o, v, mask=mask)


@triton.jit
def _corrected(
    g,  # gradient, fp32, (ROWS, WIDTH)
    r,  # retain gradient, likewise
    place,  # of each element in its tensor, int64, likewise
    coef, scale,  # where an element lies in no piece
    pieces_ptr,  # the chunk's first piece
    pieces,  # number of its pieces, int32
    coef_ptr, scale_ptr,  # as above
):  # fmt: skip
    """The gradient after surgery, where several segments may meet: each element, by its place, looks for its piece."""
    coefs = (place * 0).to(tl.float32) + coef
    scales = (place * 0).to(tl.float32) + scale
    for i in range(0, pieces):
        piece_ptr = pieces_ptr + i * 3
        inside = (place >= tl.load(piece_ptr)) & (place < tl.load(piece_ptr + 1))
        coefs = tl.where(inside, tl.load(coef_ptr + tl.load(piece_ptr + 2)), coefs)
        scales = tl.where(inside, tl.load(scale_ptr), scales)
    return (g - coefs * tl.where(coefs != 0, r, 0.0)) * scales
