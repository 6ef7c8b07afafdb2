"""From the table of inner products to what surgery does: one coefficient per segment, and one factor that clips.

With u_k, r_k the unlearn and the retain gradient of segment k, the corrected gradient is

    u'_k = (u_k - coef_k r_k) scale
    coef_k = strength min(0, <u_k, r_k>) / <r_k, r_k> - rho         0 - rho where r_k = 0; without min(0, .): two-sided
    norm^2 = sum_k <u_k, u_k> - 2 coef_k <u_k, r_k> + coef_k^2 <r_k, r_k>
    scale = min(1, max_norm / (norm + 1e-6))                        as torch's clip_grad_norm_; 1 without max_norm

so that u' does not point against r (one-sided), or is orthogonal to it (two-sided); rho > 0 adds rho r, a step along
the retain gradient. The norm of the corrected gradient is known before it exists. From a table of 6 columns the
coefficients come from the preconditioned products, the norm from the plain ones.

`released` is the rule of DoCo's released code, for comparison: u is clipped first, and what is subtracted is the cosine
itself along the unit vector r_k / |r_k|, without the length of u_k: too much by 1 / |s u_k|:

    s = min(1, max_norm / |u|)        u'_k = s u_k - strength min(0, cos_k) r_k / |r_k|        (rho adds s rho r_k)

in the form above: scale = s, coef_k = strength min(0, cos_k) / (|r_k| s) - rho. No host sync: ranks that hold the same
table get the same plan.

Usage: `plan = surgery_coefficients(table_S3, max_norm=1.0)`
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common import backend, scratch

BLOCK, WARPS = 256, 8
CLIP_EPS = 1e-6
_CLIP_EPS = tl.constexpr(CLIP_EPS)


class SurgeryPlan(NamedTuple):
    """What to do, on the device of the table, all fp32.

    coef_S, scale: u' = (u - coef r) scale. found_inf: 1 if the table or a coefficient is not finite, else 0
    (torch.amp's convention); then coef is 0, scale 1 and norm Inf, and `surgery_apply` leaves everything as it is.
    norm: of u - coef r, before scale. Its square is a difference: absolute error up to about 1e-3 |u| if next to
    nothing of u is left.
    """

    coef_S: Tensor
    scale: Tensor
    found_inf: Tensor
    norm: Tensor


def surgery_coefficients(
    table: Tensor,
    *,
    strength: float = 1.0,
    two_sided: bool = False,
    released: bool = False,
    rho: float = 0.0,
    max_norm: float | None = None,
) -> SurgeryPlan:
    """The plan for a table (S, 3) or (S, 6) of `surgery_dots`; one small launch on a GPU, no host sync.

    Raises ValueError for another shape or dtype, for max_norm <= 0, and for `released` with a preconditioned table.
    """
    if table.dim() != 2 or table.shape[1] not in (3, 6) or table.dtype != torch.float64:
        raise ValueError(f"expected a float64 table (S, 3) or (S, 6), got {table.dtype} {tuple(table.shape)}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be positive or None, got {max_norm}")
    if released and table.shape[1] == 6:
        raise ValueError("released has no preconditioned form: take the dots without second_moment")
    limit = -1.0 if max_norm is None else float(max_norm)
    return SurgeryPlan(*surgery_coefficients_op(table, strength, two_sided, released, rho, limit))


def surgery_coefficients_reference(
    table: Tensor, strength: float, two_sided: bool, released: bool, rho: float, max_norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(coef_S, scale, found_inf, norm) in plain PyTorch in fp64, rounded to fp32 at the end; max_norm < 0: no clip."""
    uu, ur, rr = table[:, :3].unbind(1)
    inner, square = table[:, -2:].unbind(1)  # the preconditioned ones if there are any, else ur and rr again
    conflict = inner if two_sided else inner.clamp(max=0)
    one = torch.ones((), dtype=torch.float64, device=table.device)
    length = uu.sum().sqrt()
    pre_scale = (max_norm / length).clamp(max=1) if released and max_norm >= 0 else one
    divisor = square * uu.sqrt() * pre_scale if released else square
    coef = torch.where(divisor > 0, strength * conflict / divisor, 0.0) - rho
    coef = coef.to(torch.float32)
    c = coef.double()  # the norm is that of what is applied
    norm = (uu - 2 * c * ur + c * c * rr).sum().clamp(min=0).sqrt()
    finite = table.isfinite().all() & coef.isfinite().all() & norm.isfinite()
    scale = (max_norm / (norm + CLIP_EPS)).clamp(max=1) if max_norm >= 0 and not released else pre_scale
    coef, scale, norm = (torch.where(finite, x, y) for x, y in ((coef, 0.0), (scale, 1.0), (norm, torch.inf)))
    coef, scale, found_inf, norm = (value.to(torch.float32) for value in (coef, scale, ~finite, norm))
    return coef, scale, found_inf, norm


@triton.jit
def surgery_coefficients_plan_kernel(
    table_ptr,  # inner products, fp64, (segments, COLUMNS)
    coef_ptr,  # fp32, (segments,), written
    scale_ptr,  # fp32, (1,), written
    found_inf_ptr,  # fp32, (1,), written
    norm_ptr,  # fp32, (1,), written
    segments,  # number of segments
    strength,  # how much of the projection is taken out
    rho,  # how much of r is added
    max_norm,  # where to clip, if CLIP
    COLUMNS: tl.constexpr,  # 3, or 6 with preconditioned products
    TWO_SIDED: tl.constexpr,  # project where the gradients agree, too
    RELEASED: tl.constexpr,  # DoCo's released rule
    CLIP: tl.constexpr,  # whether to clip
    BLOCK: tl.constexpr,  # segments at once
):
    """One program goes over the segments in fp64: twice, as only the first pass knows whether anything is not finite,
    and once more ahead for `released`, whose coefficients need the norm of everything."""
    pre_scale = tl.full([], 1.0, tl.float64)
    if RELEASED and CLIP:
        squares = tl.zeros([BLOCK], tl.float64)
        for first in range(0, segments, BLOCK):
            o_s = first + tl.arange(0, BLOCK)
            squares += tl.load(table_ptr + o_s.to(tl.int64) * COLUMNS, mask=o_s < segments, other=0.0)
        length = tl.sqrt(tl.sum(squares))
        pre_scale = tl.where(length > max_norm, max_norm / tl.where(length > max_norm, length, 1.0), 1.0)
    squares = tl.zeros([BLOCK], tl.float64)
    bad = tl.zeros([BLOCK], tl.int32)
    for first in range(0, segments, BLOCK):
        coef, square, finite = _coefficients(
            table_ptr, first, segments, strength, rho, pre_scale, COLUMNS, TWO_SIDED, RELEASED, BLOCK
        )
        squares += square
        bad += tl.where(finite, 0, 1)
    total = tl.sum(squares)
    norm = tl.sqrt(tl.where(total < 0, 0.0, total))
    finite = (tl.sum(bad) == 0) & (norm - norm == 0)
    for first in range(0, segments, BLOCK):
        coef, _, _ = _coefficients(
            table_ptr, first, segments, strength, rho, pre_scale, COLUMNS, TWO_SIDED, RELEASED, BLOCK
        )
        o_s = first + tl.arange(0, BLOCK)
        tl.store(coef_ptr + o_s, tl.where(finite, coef, 0.0), mask=o_s < segments)
    scale = pre_scale
    if CLIP and not RELEASED:
        clip = max_norm / (norm + _CLIP_EPS)
        scale = tl.where(clip < 1.0, clip, 1.0)
    tl.store(scale_ptr, tl.where(finite, scale, 1.0).to(tl.float32))
    tl.store(found_inf_ptr, tl.where(finite, 0.0, 1.0))
    tl.store(norm_ptr, tl.where(finite, norm, float("inf")).to(tl.float32))


@triton.jit
def _coefficients(
    table_ptr,  # as above
    first,  # segment, the first of BLOCK
    segments, strength, rho,  # as above
    pre_scale,  # clip factor of u itself, fp64: for RELEASED
    COLUMNS: tl.constexpr, TWO_SIDED: tl.constexpr, RELEASED: tl.constexpr, BLOCK: tl.constexpr,  # as above
):  # fmt: skip
    """(coef in fp32, |u - coef r|^2, whether the row and coef are finite) of the segments from `first` on."""
    o_s = first + tl.arange(0, BLOCK)
    mask = o_s < segments
    p_row = table_ptr + o_s.to(tl.int64) * COLUMNS
    uu = tl.load(p_row, mask=mask, other=0.0)
    ur = tl.load(p_row + 1, mask=mask, other=0.0)
    rr = tl.load(p_row + 2, mask=mask, other=0.0)
    inner, square, sums = ur, rr, uu + ur + rr
    if COLUMNS == 6:
        inner = tl.load(p_row + 4, mask=mask, other=0.0)
        square = tl.load(p_row + 5, mask=mask, other=0.0)
        sums += tl.load(p_row + 3, mask=mask, other=0.0) + inner + square
    if not TWO_SIDED:
        inner = tl.where(inner > 0, 0.0, inner)
    if RELEASED:
        square = square * tl.sqrt(uu) * pre_scale
    coef = tl.where(square > 0, strength * inner / tl.where(square > 0, square, 1.0), 0.0) - rho
    coef = tl.where(mask, coef, 0.0).to(tl.float32)
    c = coef.to(tl.float64)
    # x - x is 0 for every finite x; a sum of finite entries is finite, far below the largest fp64.
    return coef, uu - 2 * c * ur + c * c * rr, (sums - sums == 0) & (coef - coef == 0)


def _launch(
    table: Tensor, strength: float, two_sided: bool, released: bool, rho: float, max_norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table, segments = table.contiguous(), len(table)
    coef = scratch.empty((segments,), torch.float32, table.device)
    scale, found_inf, norm = (scratch.empty((), torch.float32, table.device) for _ in range(3))
    with backend.on_device(table):
        surgery_coefficients_plan_kernel[(1,)](
            table, coef, scale, found_inf, norm, segments, float(strength), float(rho), max_norm,
            COLUMNS=table.shape[1], TWO_SIDED=two_sided, RELEASED=released, CLIP=max_norm >= 0, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
    return coef, scale, found_inf, norm


@torch.library.custom_op("fastunlearn::surgery_coefficients", mutates_args=())
def surgery_coefficients_op(
    table: Tensor, strength: float, two_sided: bool, released: bool, rho: float, max_norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `surgery_coefficients_reference`; on a GPU one launch."""
    # The table is always fp64, and so is this kernel: what is asked about is the device only.
    run = _launch if backend.runs_triton([table.detach().view(torch.int64)]) else surgery_coefficients_reference
    return run(table, strength, two_sided, released, rho, max_norm)


@surgery_coefficients_op.register_fake
def _fake(table, strength, two_sided, released, rho, max_norm):
    flags = [table.new_empty((), dtype=torch.float32) for _ in range(3)]
    return table.new_empty((table.shape[0],), dtype=torch.float32), *flags
