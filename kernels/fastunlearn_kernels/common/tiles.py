"""How the parameter-space kernels walk a chunk of a tensor that they know only by its address.

A program takes one row of a table of chunks, looks up where its operands lie (`tensor_lists.addresses`) and goes
through the chunk in tiles of ROWS x WIDTH elements. The chunk is aligned if the addresses of all operands that are read
and both its bounds are divisible by 16: then ALIGNED=True puts hints on base pointers and length, and a row becomes one
16-byte load (without them: one load an element; the hints hold per operation, hence two copies of the loop and no flag
at run time). Inside a chunk offsets are int32, from base pointers that were moved by the int64 `begin`. Moments in 8
bits are those of `quantize.dynamic_code`.

Usage: see `gradients.surgery_dots`; a loop is

    length = chunk_length(begin, end, ALIGNED)
    r_ptr, r_absmax_ptr, r_phase = typed_pointer(r_at, begin, R, ALIGNED), *block_pointer(absmax_at, begin)
    for first in range(0, length, ROWS * WIDTH):
        o_row = first + tl.arange(0, ROWS) * WIDTH
        o = o_row[:, None] + tl.arange(0, WIDTH)[None, :]
        r = retain_tile(r_ptr, r_absmax_ptr, r_phase, o_row, o, length, R, ALIGNED)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Element types as kernels take them: constexpr, so that one table of int64 addresses serves every dtype.
TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}
# Elements that share one absmax in every 8-bit format here.
QUANT_BLOCK = 256
_PER_CODE = tl.constexpr(1.0 / 127.0)


@triton.jit
def chunk_row(
    chunks_ptr,  # table of chunks, int64, (chunks, 4)
    i_chunk,  # which
):
    """(tensor, begin, end, segment) of a chunk, int64 each."""
    row_ptr = chunks_ptr + i_chunk.to(tl.int64) * 4
    return tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 3)


@triton.jit
def is_aligned(
    addresses,  # those of all operands, or-ed together, int64
    begin, end,  # the chunk's elements in its tensor, int64
):  # fmt: skip
    """Whether a chunk may run with ALIGNED=True."""
    return ((addresses | begin | end) & 15) == 0


@triton.jit
def chunk_length(
    begin, end,  # the chunk's elements in its tensor, int64
    ALIGNED: tl.constexpr,  # see the module
):  # fmt: skip
    """Elements of the chunk as int32. Computed in the branch that uses it: the hint stays with the operation."""
    length = (end - begin).to(tl.int32)
    if ALIGNED:
        length = tl.multiple_of(length, 16)
    return length


@triton.jit
def typed_pointer(
    address,  # where the tensor begins, int64
    begin,  # element, int64
    DTYPE: tl.constexpr,  # Triton type of the tensor; None: it is absent
    ALIGNED: tl.constexpr,  # see the module
):
    """Pointer to element `begin` of a tensor; the address itself if the tensor is absent."""
    if DTYPE is None:
        pointer = address
    else:
        pointer = address.to(tl.pointer_type(DTYPE)) + begin
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def block_pointer(
    address,  # where the tensor's absmax begin, int64; 0 if it is not quantised
    begin,  # element, int64
):
    """Where the absmax of the block that holds element `begin` lies, and the place of `begin` in that block (int32).
    Nothing is read before `absmax_tile`."""
    return address.to(tl.pointer_type(tl.float32)) + (begin >> 8), (begin & 255).to(tl.int32)


@triton.jit
def absmax_tile(
    absmax_ptr, phase,  # of the chunk, from `block_pointer`
    o_row,  # offsets of the rows in the chunk, int32, (ROWS,)
    o,  # and of the elements, int32, (ROWS, WIDTH)
    length,  # elements of the chunk, int32
    ALIGNED: tl.constexpr,  # see the module
):  # fmt: skip
    """absmax for the elements `o` of a chunk, to be broadcast over the tile: (ROWS, 1) or (ROWS, WIDTH).

    Aligned, a row never crosses from one block of 256 into the next, as long as WIDTH divides 16 (or the chunk begins
    with a block and WIDTH divides 256), so that one load a row is enough.
    """
    if ALIGNED:
        absmax = tl.load(absmax_ptr + ((phase + o_row) >> 8), mask=o_row < length, other=0.0)[:, None]
    else:
        absmax = tl.load(absmax_ptr + ((phase + o) >> 8), mask=o < length, other=0.0)
    return absmax


@triton.jit
def retain_tile(
    r_ptr,  # the chunk's first element
    absmax_ptr, phase,  # of the chunk, from `block_pointer`
    o_row,  # offsets of the rows in the chunk, int32, (ROWS,)
    o,  # and of the elements, int32, (ROWS, WIDTH)
    length,  # elements of the chunk, int32; 0 reads nothing at all
    R: tl.constexpr,  # Triton type; int8: codes, value = code * absmax / 127; None: absent, that is zeros
    ALIGNED: tl.constexpr,  # see the module
):  # fmt: skip
    """Retain gradient at the offsets `o` of a chunk in fp32, 0 beyond `length`."""
    if R is None:
        r = (o * 0).to(tl.float32)
    elif R == tl.int8:  # noqa: SIM300
        code = tl.load(r_ptr + o, mask=o < length, other=0).to(tl.float32)
        r = code * (absmax_tile(absmax_ptr, phase, o_row, o, length, ALIGNED) * _PER_CODE)
    else:
        r = tl.load(r_ptr + o, mask=o < length, other=0.0).to(tl.float32)
    return r
