"""bitsandbytes' dynamic 8-bit number format, in which AdamW's moments are kept: map, reference and Triton form.

Written from the mathematics. A block of 256 numbers is divided by its largest magnitude, `absmax`; what is left, y in
[-1, 1], becomes one of 256 values. Decade i = 0 .. 6 is 10^(i-6) [0.1, 1] and is cut into equal cells whose midpoints
are the values: 2^i cells for each sign (signed), 2^(i+1) (unsigned). With 0 and 1 that makes 256 (there is no -1);
the code is the place in ascending order.

Ordered by magnitude, value number q behaves like a floating-point number: cell j of decade i is q = W + j with W =
2^i cells (unsigned: 2^(i+1)), so on the continuous scale F = W (z + 0.8) / 0.9, z = |y| 10^(6-i), the cell is
floor(F). It is the nearest value too, save at the start of a decade, where the cells become five times as wide: the
border between two values there lies at F = W + 0.2, not W, whatever the decade. The kernel finds the decade in three
comparisons and rounds min(F - 1/2, the line of slope 5/4 through (W + 0.2, W - 1/2) and (W + 1, W)), which has the
right borders on either side. That is 24 instructions an element on sm_90 for m and 22 for v, packing included; a
binary search takes 8 dependent loads. Nearest means: for a y that is off by at most 2^-22 of its decade's upper end,
which is fp32's rounding on the way.

Int8 linear codes are in `blockwise_quantize`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common.precision import compute_dtype
from fastunlearn_kernels.common.tiles import QUANT_BLOCK

# Below this absmax 1 / absmax overflows or is lost: such a block becomes all zeros, an error of less than 1.2e-38.
SMALLEST_ABSMAX = 2.0**-126

_SMALLEST = tl.constexpr(SMALLEST_ABSMAX)
_SLOPE = tl.constexpr(1 / 0.9)
_START = tl.constexpr(0.8 / 0.9)
_STEEP_SLOPE = tl.constexpr(1.25 / 0.9)
_STEEP_START = tl.constexpr(1.25 * 0.8 / 0.9 - 0.25)
# Added to a number below 256 this rounds it to an integer, which is then the low byte of the sum's bits.
_ROUND = tl.constexpr(2.0**23 + 256)
_SIGN = tl.constexpr(-(2**31))


def dynamic_map(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 256 values in ascending order, fp32; bitsandbytes' to the last bit. Cached: do not write to it."""
    return _dynamic_map(signed, torch.device(device))


@functools.cache
def _dynamic_map(signed: bool, device: torch.device) -> Tensor:
    magnitudes = []
    for decade in range(7):
        # In fp32 throughout, as bitsandbytes rounds.
        borders = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float32)
        magnitudes.append((borders[:-1] + borders[1:]) / 2 * 10.0 ** (decade - 6))
    ascending = torch.cat(magnitudes)
    below = -ascending.flip(0) if signed else ascending[:0]
    return torch.cat([below, torch.zeros(1), ascending, torch.ones(1)]).to(device)


@functools.cache
def _borders(signed: bool, device: torch.device) -> Tensor:
    """Halfway between neighbouring values, fp64."""
    values = dynamic_map(signed, device).double()
    return (values[:-1] + values[1:]) / 2


def nearest_code(y: Tensor, signed: bool) -> Tensor:
    """uint8 code of the value nearest to each y in [-1, 1]."""
    return torch.bucketize(y.double(), _borders(signed, y.device)).to(torch.uint8)


def quantize_dynamic(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The elements of `x` in order -> (codes uint8 of its shape, absmax fp32 of each 256 elements). The reference.

    A block that holds NaN or Inf gets absmax NaN or Inf, and dequantises to NaN throughout, save for Inf itself.
    """
    wide = x.to(compute_dtype(x)).reshape(-1)
    blocks = torch.nn.functional.pad(wide, (0, -len(wide) % QUANT_BLOCK)).view(-1, QUANT_BLOCK)
    absmax = blocks.abs().amax(1) if len(blocks) else blocks.new_zeros(0)
    scale = torch.where(absmax < SMALLEST_ABSMAX, torch.inf, absmax)
    codes = nearest_code(blocks / scale[:, None], signed)
    return codes.reshape(-1)[: len(wide)].reshape(x.shape), absmax.float()


def dequantize_dynamic(codes: Tensor, absmax: Tensor, signed: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """value[code] * absmax, in the shape of `codes`. The reference."""
    values = dynamic_map(signed, codes.device).to(dtype)[codes.reshape(-1).long()]
    return (values * absmax.to(dtype).repeat_interleave(QUANT_BLOCK)[: len(values)]).reshape(codes.shape)


@triton.jit
def dequantize_tile(
    codes,  # uint8, any shape
    map_ptr,  # values of the map, fp32, (256,)
):
    """Values of uint8 codes, not yet multiplied by absmax. The map (1 KiB) lives in the L1 cache: a load costs 3
    instructions, the arithmetic would cost 18."""
    return tl.load(map_ptr + codes.to(tl.int32))


@triton.jit
def inverse_absmax(
    absmax,  # fp32, any shape
):
    """What to multiply by to get y: 1 / absmax, rounded such that absmax itself gives 1 at most; 0 for tiny blocks."""
    inverse = 1.0 / tl.where(absmax < _SMALLEST, 1.0, absmax)
    inverse = tl.where(absmax * inverse > 1.0, inverse * (1 - 4e-7), inverse)
    return tl.where(absmax < _SMALLEST, 0.0, inverse)


@triton.jit
def quantize_tile(
    x,  # fp32, any shape; unsigned: x >= 0
    inverse,  # from `inverse_absmax`, to be broadcast
    SIGNED: tl.constexpr,  # which map
):
    """uint8 codes of y = x * inverse, |y| <= 1."""
    y = tl.abs(x) * inverse
    w = tl.full(y.shape, 64.0 if SIGNED else 128.0, tl.float32)
    low = y < 1e-4
    z, w = tl.where(low, y * 1e4, y), tl.where(low, w * 0.0625, w)
    low = z < 1e-2
    z, w = tl.where(low, z * 1e2, z), tl.where(low, w * 0.25, w)
    low = z < 1e-1
    z, w = tl.where(low, z * 1e1, z), tl.where(low, w * 0.5, w)
    q = tl.minimum((z * _SLOPE + _START) * w - 0.5, (z * _STEEP_SLOPE + _STEEP_START) * w - 0.75)
    # The border above 0, which is no cell's: a line that crosses it there and lies below `q` everywhere else.
    # Then the one below 1, no cell's either: a quarter of a cell from the end.
    if SIGNED:
        q = tl.maximum(q, y * 100.0 + (0.5 - 2.75e-5))
        sign = x.to(tl.int32, bitcast=True) & _SIGN
        q = (q.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        code = tl.maximum(q, q * 2 - 127.0) + (_ROUND + 127)
    else:
        # Compared as integers, since the line is positive: NVIDIA takes the largest of three integers at once.
        low = (y * 200.0 + (1.5 - 3.25e-5)).to(tl.int32, bitcast=True)
        top = (q * 2 - 255.0).to(tl.int32, bitcast=True)
        q = tl.maximum(tl.maximum(q.to(tl.int32, bitcast=True), low), top).to(tl.float32, bitcast=True)
        code = q + (_ROUND - 1)
    return code.to(tl.int32, bitcast=True).to(tl.uint8)
