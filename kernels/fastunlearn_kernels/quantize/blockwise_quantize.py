"""8-bit linear codes with one scale per 256 elements: how the retain gradient is kept between two backward passes.

For each block of 256 elements of a tensor, in logical order, with absmax = max |x|:

    code = round(127 x / absmax), int8           x' = code absmax / 127

Error: |x' - x| <= absmax / 254 when rounding to nearest (ties to even), < absmax / 127 when rounding stochastically,
which is unbiased: y is rounded up with the probability y - floor(y), to within 2^-17. To that comes fp32's own
rounding: a few units in the last place of x', at least one denormal number. A block of zeros has absmax 0; one with
NaN or Inf has absmax NaN and codes 0, so that it comes back as NaN.

Memory: 1 + 4/256 bytes an element instead of 4. Codes and scales of a list lie in one allocation each, the codes of
every tensor at a multiple of 256, so that vector loads stay possible. Non-contiguous tensors are quantised in logical
order; their codes are contiguous. One launch a list, each element read once and written once. The dynamic map of
the optimizer's moments is in `dynamic_code`.

Usage: `kept = blockwise_quantize(grads)`; `grads = blockwise_dequantize(kept, torch.bfloat16)`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common import backend, scratch
from fastunlearn_kernels.common.precision import compute_dtype
from fastunlearn_kernels.common.rounding import rounding_halves, rounding_halves_tile
from fastunlearn_kernels.common.tensor_lists import addresses
from fastunlearn_kernels.common.tiles import QUANT_BLOCK, TYPES, chunk_length, chunk_row, is_aligned, typed_pointer
from fastunlearn_kernels.quantize.block_chunks import block_chunks, first_elements, views

ROWS = 8  # blocks of one tile: 16 elements a thread, one 16-byte load of bf16 or two
# Rounds a number below 2^22 to an integer whose two's complement is in the low byte of the sum's bits.
_ROUND = tl.constexpr(1.5 * 2.0**23)
_PER_CODE = tl.constexpr(1.0 / 127.0)
# 16 random bits become a number between -1/2 and 1/2, both excluded.
_UNIT, _HALF_DOWN = tl.constexpr(2.0**-16), tl.constexpr(2.0**-17 - 0.5)
# Blocks below the first number are scaled up by the second, or 127 / absmax would overflow.
SMALL, UP = 2.0**-100, 2.0**100
_SMALL, _UP = tl.constexpr(SMALL), tl.constexpr(UP)
_INFINITY = tl.constexpr(0x7F800000)  # the bits


class Quantized(NamedTuple):
    """codes: int8, in the shapes of the tensors. absmax: fp32, (ceil(numel / 256),) each."""

    codes: list[Tensor]
    absmax: list[Tensor]


def blockwise_quantize(tensors: Sequence[Tensor], *, stochastic: bool = False, seed: int = 0) -> Quantized:
    """Quantise a list of tensors of one dtype. `seed` counts only if `stochastic`; take another one each time.

    Raises ValueError for mixed or integer dtypes.
    """
    tensors = list(tensors)
    if not tensors:
        return Quantized([], [])
    if len({t.dtype for t in tensors}) > 1 or not tensors[0].is_floating_point():
        raise ValueError(f"expected tensors of one float dtype, got {sorted({str(t.dtype) for t in tensors})}")
    codes, absmax = blockwise_quantize_op(tensors, stochastic, seed)
    shapes, numels = [t.shape for t in tensors], [t.numel() for t in tensors]
    return Quantized(views(codes, shapes, numels), _scales(absmax, numels))


def blockwise_dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The tensors in `dtype`, contiguous, in one allocation. Raises ValueError if codes and scales do not pair up."""
    codes, absmax = list(quantized.codes), list(quantized.absmax)
    if not codes:
        return []
    numels = [t.numel() for t in codes]
    wanted = [-(-numel // QUANT_BLOCK) for numel in numels]
    if [t.numel() for t in absmax] != wanted or any(t.dtype != torch.int8 for t in codes):
        raise ValueError("codes must be int8, with one absmax for each 256 elements of each tensor")
    return views(blockwise_dequantize_op(codes, absmax, dtype), [t.shape for t in codes], numels)


def _scales(absmax: Tensor, numels: Sequence[int]) -> list[Tensor]:
    return list(absmax.split([-(-numel // QUANT_BLOCK) for numel in numels]))


def blockwise_quantize_reference(tensors: Sequence[Tensor], stochastic: bool, seed: int) -> tuple[Tensor, Tensor]:
    """(codes, absmax) of the whole list, flat, in plain PyTorch; between tensors, codes are 0."""
    firsts = first_elements([t.numel() for t in tensors])
    flat = tensors[0].new_zeros(firsts[-1], dtype=compute_dtype(*tensors))
    for first, tensor in zip(firsts, tensors):
        flat[first : first + tensor.numel()] = tensor.reshape(-1)
    blocks = flat.view(-1, QUANT_BLOCK)
    absmax = blocks.abs().amax(1) if len(blocks) else flat
    absmax = torch.where(absmax.isfinite(), absmax, torch.nan)
    up = torch.where(absmax < SMALL, UP, 1.0)
    inverse = torch.where(absmax > 0, 127 / (absmax * up), 0.0)
    y = torch.where(absmax[:, None].isfinite(), blocks, 0.0) * up[:, None] * inverse[:, None]
    if stochastic:
        halves = rounding_halves(seed, torch.arange(firsts[-1], device=flat.device)).view(-1, QUANT_BLOCK)
        y = y + (halves.to(y.dtype) * 2.0**-16 + (2.0**-17 - 0.5))
    codes = y.round()
    return codes.to(torch.int8).reshape(-1), absmax.float()


def blockwise_dequantize_reference(codes: Sequence[Tensor], absmax: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The list, flat, in plain PyTorch; between tensors there are zeros."""
    firsts = first_elements([t.numel() for t in codes])
    flat = codes[0].new_zeros(firsts[-1], dtype=dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for first, tensor, scales in zip(firsts, codes, absmax):
        spread = scales.to(compute).repeat_interleave(QUANT_BLOCK)[: tensor.numel()]
        flat[first : first + tensor.numel()] = (tensor.reshape(-1).to(compute) / 127 * spread).to(dtype)
    return flat


@triton.jit
def blockwise_quantize_chunk_kernel(
    chunks_ptr,  # table of `block_chunks`, int64, (chunks, 4)
    addresses_ptr,  # where each tensor begins, int64, (tensors,)
    codes_ptr,  # int8, (elements,), written; `element` is the place in it
    absmax_ptr,  # fp32, (elements / 256,), written
    seed,  # of the random bits, an integer
    X: tl.constexpr,  # Triton type of the tensors
    STOCHASTIC: tl.constexpr,  # whether to round stochastically
    ROWS: tl.constexpr,  # blocks of a tile
    WIDTH: tl.constexpr,  # elements of a block
):
    """Program = chunk of whole blocks."""
    tensor, begin, end, element = chunk_row(chunks_ptr, tl.program_id(0))
    at = tl.load(addresses_ptr + tensor)
    if is_aligned(at, begin, end):
        _quantize_chunk(at, codes_ptr, absmax_ptr, seed, begin, end, element, X, STOCHASTIC, ROWS, WIDTH, True)
    else:
        _quantize_chunk(at, codes_ptr, absmax_ptr, seed, begin, end, element, X, STOCHASTIC, ROWS, WIDTH, False)


@triton.jit
def _quantize_chunk(
    at,  # address of the tensor, int64
    codes_ptr, absmax_ptr, seed,  # as above
    begin, end,  # the chunk's elements in the tensor, int64
    element,  # number of the tensor's first element, int64
    X: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,  # as above
    ALIGNED: tl.constexpr,  # see `tiles`
):  # fmt: skip
    length = chunk_length(begin, end, ALIGNED)
    x_ptr = typed_pointer(at, begin, X, ALIGNED)
    element += begin  # the chunk's first one; a multiple of 256
    codes_ptr = tl.multiple_of(codes_ptr + element, 16)
    absmax_ptr += element >> 8
    for first in range(0, length, ROWS * WIDTH):
        o_row = first + tl.arange(0, ROWS) * WIDTH
        o = o_row[:, None] + tl.arange(0, WIDTH)[None, :]
        x = tl.load(x_ptr + o, mask=o < length, other=0.0).to(tl.float32)
        # As integers, so that NaN counts as the largest.
        top = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1)
        finite = top < _INFINITY
        absmax = top.to(tl.float32, bitcast=True)
        up = tl.where(absmax < _SMALL, _UP, 1.0)
        inverse = tl.where(absmax > 0, 127.0 / tl.where(absmax > 0, absmax * up, 1.0), 0.0)
        y = (tl.where(finite[:, None], x, 0.0) * up[:, None]) * tl.where(finite, inverse, 0.0)[:, None]
        if STOCHASTIC:
            seed_value = element * 0 + seed  # a seed of 1 is a constant, which has no methods
            halves = rounding_halves_tile(seed_value, element + o_row, WIDTH)
            y += halves.to(tl.float32) * _UNIT + _HALF_DOWN
        code = (y + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)
        tl.store(codes_ptr + o, code, mask=o_row[:, None] < length)  # whole blocks: behind the end lie zeros
        tl.store(absmax_ptr + (o_row >> 8), tl.where(finite, absmax, float("nan")), mask=o_row < length)


@triton.jit
def blockwise_dequantize_chunk_kernel(
    chunks_ptr,  # table of `block_chunks`, int64, (chunks, 4)
    addresses_ptr,  # where codes (row 0) and absmax (row 1) of each tensor begin, int64, (2, tensors)
    out_ptr,  # the list, flat, (elements,), written in its dtype
    tensors,  # number of tensors
    ROWS: tl.constexpr,  # blocks of a tile
    WIDTH: tl.constexpr,  # elements of a block
):
    """Program = chunk of whole blocks."""
    tensor, begin, end, element = chunk_row(chunks_ptr, tl.program_id(0))
    at, absmax_at = tl.load(addresses_ptr + tensor), tl.load(addresses_ptr + tensors + tensor)
    if is_aligned(at, begin, end):
        _dequantize_chunk(at, absmax_at, out_ptr, begin, end, element, ROWS, WIDTH, True)
    else:
        _dequantize_chunk(at, absmax_at, out_ptr, begin, end, element, ROWS, WIDTH, False)


@triton.jit
def _dequantize_chunk(
    at, absmax_at,  # addresses of the tensor's codes and absmax, int64
    out_ptr,  # as above
    begin, end,  # the chunk's elements in the tensor, int64
    element,  # number of the tensor's first element, int64
    ROWS: tl.constexpr, WIDTH: tl.constexpr,  # as above
    ALIGNED: tl.constexpr,  # see `tiles`
):  # fmt: skip
    length = chunk_length(begin, end, ALIGNED)
    code_ptr = typed_pointer(at, begin, tl.int8, ALIGNED)
    absmax_ptr = absmax_at.to(tl.pointer_type(tl.float32)) + (begin >> 8)
    out_ptr = tl.multiple_of(out_ptr + (element + begin), 16)
    for first in range(0, length, ROWS * WIDTH):
        o_row = first + tl.arange(0, ROWS) * WIDTH
        o = o_row[:, None] + tl.arange(0, WIDTH)[None, :]
        code = tl.load(code_ptr + o, mask=o < length, other=0).to(tl.float32)
        absmax = tl.load(absmax_ptr + (o_row >> 8), mask=o_row < length, other=0.0)
        # In this order neither large nor denormal scales do harm.
        x = (code * _PER_CODE) * absmax[:, None]
        tl.store(out_ptr + o, x.to(out_ptr.dtype.element_ty), mask=o_row[:, None] < length)  # whole blocks


def _launch_quantize(tensors: Sequence[Tensor], stochastic: bool, seed: int) -> tuple[Tensor, Tensor]:
    device, numels = tensors[0].device, tuple(t.numel() for t in tensors)
    size = first_elements(numels)[-1]
    codes = scratch.empty((size,), torch.int8, device)
    absmax = scratch.empty((size // QUANT_BLOCK,), torch.float32, device)
    chunks, ordered = block_chunks(numels, device), [t.contiguous() for t in tensors]
    if len(chunks):
        with backend.on_device(codes):
            blockwise_quantize_chunk_kernel[(len(chunks),)](
                chunks, addresses(ordered), codes, absmax, seed, X=TYPES[tensors[0].dtype], STOCHASTIC=stochastic,
                ROWS=ROWS, WIDTH=QUANT_BLOCK,
            )  # fmt: skip
    return codes, absmax


def _launch_dequantize(codes: Sequence[Tensor], absmax: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    device, numels = codes[0].device, tuple(t.numel() for t in codes)
    out = scratch.empty((first_elements(numels)[-1],), dtype, device)
    chunks, ordered = block_chunks(numels, device), [[t.contiguous() for t in ts] for ts in (codes, absmax)]
    if len(chunks):
        with backend.on_device(out):
            blockwise_dequantize_chunk_kernel[(len(chunks),)](
                chunks, addresses(*ordered), out, len(codes), ROWS=ROWS, WIDTH=QUANT_BLOCK
            )
    return out


@torch.library.custom_op("fastunlearn::blockwise_quantize", mutates_args=())
def blockwise_quantize_op(tensors: Sequence[Tensor], stochastic: bool, seed: int) -> tuple[Tensor, Tensor]:
    """As `blockwise_quantize_reference`; on a GPU one launch."""
    run = _launch_quantize if backend.runs_triton(tensors) else blockwise_quantize_reference
    return run(tensors, stochastic, seed)


@blockwise_quantize_op.register_fake
def _fake_quantize(tensors, stochastic, seed):
    size = first_elements([t.numel() for t in tensors])[-1]
    like = tensors[0]
    return like.new_empty((size,), dtype=torch.int8), like.new_empty((size // QUANT_BLOCK,), dtype=torch.float32)


@torch.library.custom_op("fastunlearn::blockwise_dequantize", mutates_args=())
def blockwise_dequantize_op(codes: Sequence[Tensor], absmax: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """As `blockwise_dequantize_reference`; on a GPU one launch."""
    triton_runs = dtype != torch.float64 and backend.runs_triton([*codes, *absmax])
    return (_launch_dequantize if triton_runs else blockwise_dequantize_reference)(codes, absmax, dtype)


@blockwise_dequantize_op.register_fake
def _fake_dequantize(codes, absmax, dtype):
    return codes[0].new_empty((first_elements([t.numel() for t in codes])[-1],), dtype=dtype)
