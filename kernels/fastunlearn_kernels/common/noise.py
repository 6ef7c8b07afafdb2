"""Random numbers that a kernel can make again instead of reading them: Gaussian noise and bits for rounding.

Element i of sample b gets its number from (seed_B[b], i) alone, so that it does not depend on the batch, the launch or
the device, and any later op regenerates it bit for bit on the same device. Between devices the last bits differ, since
their logarithms and cosines do. Not torch's generator.

Gaussian: Philox4x32-10 (Salmon et al. 2011) with key = seed and counter = (i low, i high, 0, 0), its first two words
a, b turned into u = (word + 0.5) 2^-32, then Box-Muller: sqrt(-2 ln u_a) cos(2 pi u_b).
Bits: a 32-bit finaliser (two multiply-xorshift rounds) over the seed and the element number; enough for rounding, where
Philox would cost as much as the rest of the kernel.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_MASK = 0xFFFFFFFF
_TWO_PI = tl.constexpr(2 * math.pi)
_UNIT = tl.constexpr(2.0**-32)


def philox(seed: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
    """The first two 32-bit words of Philox4x32-10, as int64; `seed` and `counter` int64, broadcast."""
    seed, counter = torch.broadcast_tensors(seed, counter)
    c = [counter & _MASK, counter >> 32 & _MASK, torch.zeros_like(counter), torch.zeros_like(counter)]
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        low0, high0 = _product(0xD2511F53, c[0])
        low1, high1 = _product(0xCD9E8D57, c[2])
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c[0], c[1]


def gaussian(seed_B: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal noise of `shape` (B, ...), made in fp64 from the documented counter and rounded to `dtype`."""
    index = torch.arange(math.prod(shape[1:]), device=seed_B.device)
    a, b = philox(seed_B.reshape(-1, 1), index)
    radius = (-2 * ((a.double() + 0.5) * 2.0**-32).log()).sqrt()
    return (radius * (2 * math.pi * (b.double() + 0.5) * 2.0**-32).cos()).to(dtype).reshape(shape)


def check_seeds(seed_B: Tensor | None, batch: int) -> None:
    """Raises ValueError unless there is one int64 seed for each of `batch` samples, or none at all."""
    if seed_B is not None and (seed_B.dtype != torch.int64 or seed_B.shape != (batch,)):
        raise ValueError(f"seed_B must be int64 of shape ({batch},), got {seed_B.dtype} of {tuple(seed_B.shape)}")


def rounding_bits(seed: int, index: Tensor) -> Tensor:
    """32 random bits per element, as int64, for element numbers `index` (int64)."""
    x = (index & _MASK) * 0x9E3779B9 + (seed & _MASK) + (index >> 32 & _MASK) * 0x85EBCA6B & _MASK
    x = _product(0x21F0AAAD, x ^ x >> 16)[0]
    x = _product(0x735A2D97, x ^ x >> 15)[0]
    return x ^ x >> 15


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of a product of 32-bit numbers held in int64."""
    low = factor * (x & 0xFFFF)
    high = factor * (x >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return total & _MASK, (high >> 16) + (total >> 32) & _MASK


@triton.jit
def gaussian_tile(seed, index):
    """Noise for int64 element numbers `index` of the sample with that int64 seed: the Triton form of `gaussian`."""
    zero = (index * 0).to(tl.uint32)
    a, b, _, _ = tl.philox(seed, index.to(tl.uint32), (index >> 32).to(tl.uint32), zero, zero)
    return tl.sqrt(2.0 * _minus_log(a)) * _cos_of_turn(b)


@triton.jit
def _minus_log(word):
    """-ln u for u = (word + 0.5) 2^-32, in fp32. Above 1/2 from 1 - u, which does not round to 0 where u rounds to 1:
    with z = (1 - u) / (1 + u) <= 1/3, -ln u = 2 (z + z^3 / 3 + z^5 / 5 + ...)."""
    rest = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * _UNIT
    z = rest / (2.0 - rest)
    y = z * z
    series = 1.0 + y * (1 / 3 + y * (1 / 5 + y * (1 / 7 + y * (1 / 9 + y * (1 / 11 + y * (1 / 13 + y * (1 / 15)))))))
    return tl.where(word >= 0x80000000, 2.0 * z * series, -tl.log((word.to(tl.float32) + 0.5) * _UNIT))


@triton.jit
def _cos_of_turn(word):
    """cos(2 pi u) for u = (word + 0.5) 2^-32, in fp32. The angle is reduced to a quarter turn in integers, so that no
    digit is lost, nor stack needed as for the cosine of any angle; the series of the sine is off by less than 1e-9."""
    folded = tl.minimum(word, word ^ 0xFFFFFFFF)  # cos(2 pi u) = cos(2 pi (1 - u))
    x = ((0x40000000 - folded.to(tl.int32)).to(tl.float32) - 0.5) * (_UNIT * _TWO_PI)
    y = x * x
    tail = 1.0 - y * (1 / 72) * (1.0 - y * (1 / 110) * (1.0 - y * (1 / 156)))
    return x * (1.0 - y * (1 / 6) * (1.0 - y * (1 / 20) * (1.0 - y * (1 / 42) * tail)))


@triton.jit
def rounding_bits_tile(seed, index):
    """32 random bits per int64 element number: the Triton form of `rounding_bits`; `seed`: scalar integer tensor."""
    return rounding_bits_of_words(seed, index.to(tl.uint32), (index >> 32).to(tl.uint32))


@triton.jit
def rounding_bits_of_words(seed, low, high):
    """The same from the two 32-bit words of the element number; where `high` is a row's, its share is a row's too."""
    x = low * 0x9E3779B9 + (seed.to(tl.uint32) + high * 0x85EBCA6B)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)
