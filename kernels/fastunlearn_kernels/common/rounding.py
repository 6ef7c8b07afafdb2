"""Stochastic rounding: random bits made from an element's number, and bf16 rounded with them.

x is rounded to one of its two neighbours, up with a probability that equals its distance from the lower one (exactly so
for bf16 from fp32, whose 16 lost bits meet 16 random ones), so that the mean is x and small updates are not lost.

Bits: a 32-bit finaliser (two multiply-xorshift rounds) over the seed and the element's number, so that they depend
neither on the launch nor on the device; enough for rounding, where Philox would cost as much as the rest of the kernel.
Two neighbours share one word of `rounding_bits`: element i has half i mod 2 of word i // 2. The elements that a kernel
calls neighbours are those of one row of a tile whose first element is a multiple of 256.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MASK = 0xFFFFFFFF
PIECE = 2**14


def rounding_bits(seed: int, index: Tensor) -> Tensor:
    """32 random bits per element, as int64, for element numbers `index` (int64)."""
    x = (index & _MASK) * 0x9E3779B9 + (seed & _MASK) + (index >> 32 & _MASK) * 0x85EBCA6B & _MASK
    x = _low_product(0x21F0AAAD, x ^ x >> 16)
    x = _low_product(0x735A2D97, x ^ x >> 15)
    return x ^ x >> 15


def _low_product(factor: int, x: Tensor) -> Tensor:
    """Low 32 bits of a product of 32-bit numbers held in int64."""
    low = factor * (x & 0xFFFF)
    high = factor * (x >> 16)
    return low + ((high & 0xFFFF) << 16) & _MASK


def rounding_halves(seed: int, index: Tensor) -> Tensor:
    """16 random bits per element, as int64, for element numbers `index` (int64)."""
    # Piece by piece the intermediate results stay in the cache of a CPU, which is three times as quick.
    pieces = index.reshape(-1).split(PIECE if index.device.type == "cpu" else max(1, index.numel()))
    halves = [rounding_bits(seed, piece >> 1) >> (piece & 1) * 16 & 0xFFFF for piece in pieces]
    return torch.cat(halves).view(index.shape)


def to_bf16_stochastic(x: Tensor, halves: Tensor) -> Tensor:
    """fp32 -> bf16 with the given bits; NaN and Inf stay what they are."""
    bits = x.float().view(torch.int32).long() + halves
    rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))


@triton.jit
def rounding_bits_of_words(
    seed,  # scalar, an integer
    low,  # lower words of the elements' numbers, uint32, any shape
    high,  # upper words, uint32, to be broadcast
):
    """`rounding_bits` of elements whose numbers are two words; where `high` is a row's, its share is a row's too."""
    x = low * 0x9E3779B9 + (seed.to(tl.uint32) + high * 0x85EBCA6B)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def rounding_halves_tile(
    seed,  # scalar, int64
    element,  # numbers of the rows' first elements, multiples of 256, int64, (rows,)
    WIDTH: tl.constexpr,  # elements of a row
):
    """16 random bits each, as int32 (rows, WIDTH). A row lies within one value of the upper word."""
    pair = (element >> 1)[:, None]
    low = pair.to(tl.uint32) + tl.arange(0, WIDTH // 2)[None, :].to(tl.uint32)
    word = rounding_bits_of_words(seed, low, (pair >> 32).to(tl.uint32))
    halves = tl.join(word & 0xFFFF, word >> 16).to(tl.int32)
    return tl.reshape(halves, [element.shape[0], WIDTH])


@triton.jit
def to_bf16_stochastic_tile(
    x,  # fp32, any shape
    halves,  # 16 random bits each, int32, its shape
):
    """The Triton form of `to_bf16_stochastic`."""
    bits = x.to(tl.int32, bitcast=True)
    # NaN may be all ones, which must not run over into the sign; Inf has no bits to carry.
    bits = tl.where(x == x, bits + halves, bits)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
