"""Stochastic rounding: 16 random bits an element, and bf16 rounded with them.

x is rounded to one of its two neighbours, up with a probability that equals its distance from the lower one (exactly so
for bf16 from fp32, whose 16 lost bits meet 16 random ones), so that the mean is x and small updates are not lost.
Two neighbours share one 32-bit word of `noise.rounding_bits`: element i has half i mod 2 of word i // 2. The elements
that a kernel calls neighbours are those of one row of a tile whose first number is a multiple of 256.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common.noise import rounding_bits, rounding_bits_of_words

PIECE = 2**14


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
def rounding_halves_tile(seed, number, WIDTH: tl.constexpr):
    """16 random bits, as int32 (rows, WIDTH): `number` (rows,) int64 are the numbers of the rows' first elements,
    multiples of 256, so that a row lies within one value of the upper word. `seed`: int64 scalar tensor."""
    pair = (number >> 1)[:, None]
    low = pair.to(tl.uint32) + tl.arange(0, WIDTH // 2)[None, :].to(tl.uint32)
    word = rounding_bits_of_words(seed, low, (pair >> 32).to(tl.uint32))
    halves = tl.join(word & 0xFFFF, word >> 16).to(tl.int32)
    return tl.reshape(halves, [number.shape[0], WIDTH])


@triton.jit
def to_bf16_stochastic_tile(x, halves):
    """The Triton form of `to_bf16_stochastic`."""
    bits = x.to(tl.int32, bitcast=True)
    # NaN may be all ones, which must not run over into the sign; Inf has no bits to carry.
    bits = tl.where(x == x, bits + halves, bits)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
