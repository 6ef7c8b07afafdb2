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

in the form above: scale = s, coef_k = strength min(0, cos_k) / (|r_k| s) - rho. Not here: any gradient. No host sync:
ranks that hold the same table get the same plan.

Usage: `plan = surgery_coefficients(table_S3, max_norm=1.0)`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common import backend, scratch
from fastunlearn_kernels.testing.spec import AotKernel, Case, Inputs, OpSpec, Outputs

BLOCK, WARPS = 256, 8
CLIP_EPS = 1e-6
_CLIP_EPS = tl.constexpr(CLIP_EPS)


class Plan(NamedTuple):
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
) -> Plan:
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
    return Plan(*surgery_coefficients_op(table, strength, two_sided, released, rho, limit))


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
    table_ptr, coef_ptr, scale_ptr, found_inf_ptr, norm_ptr, segments, strength, rho, max_norm,
    COLUMNS: tl.constexpr, TWO_SIDED: tl.constexpr, RELEASED: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    table_ptr, first, segments, strength, rho, pre_scale,
    COLUMNS: tl.constexpr, TWO_SIDED: tl.constexpr, RELEASED: tl.constexpr, BLOCK: tl.constexpr,
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


def _run(inputs: Inputs) -> Outputs:
    return surgery_coefficients(**inputs)._asdict()


def _eager(inputs: Inputs) -> Outputs:
    """Segment by segment, as one writes it."""
    table, options = inputs["table"], inputs
    strength, max_norm, rho = options.get("strength", 1.0), options.get("max_norm"), options.get("rho", 0.0)
    released, limit = options.get("released", False), max_norm or float("inf")
    pre_scale = torch.clamp(limit / table[:, 0].sum().sqrt(), max=1.0) if released else torch.ones(())
    coefs, squared = [], torch.zeros((), dtype=torch.float64)
    for row in table:
        uu, ur, rr, inner, square = row[0], row[1], row[2], row[-2], row[-1]
        coef = torch.zeros((), dtype=torch.float64) - rho
        if square > 0 and (inner < 0 or options.get("two_sided", False)):
            coef = strength * inner / square - rho
            if released and uu > 0:
                coef = strength * inner / (uu.sqrt() * rr.sqrt()) / rr.sqrt() / pre_scale - rho
        coefs.append(coef)
        squared = squared + uu - 2 * coef * ur + coef**2 * rr
    norm = squared.clamp(min=0).sqrt()
    scale = pre_scale if released else torch.clamp(limit / (norm + CLIP_EPS), max=1.0)
    if not table.isfinite().all():
        coefs, scale, norm = [torch.zeros(()) for _ in coefs], torch.ones(()), torch.full((), float("inf"))
    coef_S = torch.stack([c.float() for c in coefs]) if coefs else torch.zeros(0)
    found_inf = (~table.isfinite().all()).float()
    return {"coef_S": coef_S, "scale": scale.float(), "found_inf": found_inf, "norm": norm.float()}


def _table(
    segments: int, columns: int = 3, damage: float | None = None, retain: float = 1.0, **options: Any
) -> Callable[[torch.Generator, torch.dtype, torch.device], Inputs]:
    """A factory of tables of random vectors of 20 elements per segment: products that belong together."""

    def make(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        u, r = torch.randn(2, segments, 20, generator=draw, dtype=torch.float64).unbind(0)
        r = retain * r
        weights = [torch.ones_like(u)] + [torch.rand(u.shape, generator=draw, dtype=torch.float64)] * (columns == 6)
        table = torch.cat([torch.stack([u * u * w, u * r * w, r * r * w], -1).sum(1) for w in weights], 1)
        if damage is not None:
            table[segments // 2, 1] = damage
        return {"table": table.to(device)} | options

    return make


def _kernel(name: str, columns: int = 3, two_sided: bool = False, released: bool = False) -> AotKernel:
    signature = {"table_ptr": "*fp64"} | {f"{name}_ptr": "*fp32" for name in ("coef", "scale", "found_inf", "norm")}
    signature |= {"segments": "i32", "strength": "fp32", "rho": "fp32", "max_norm": "fp32"}
    constants = {"COLUMNS": columns, "TWO_SIDED": two_sided, "RELEASED": released, "CLIP": True, "BLOCK": BLOCK}
    signature |= dict.fromkeys(constants, "constexpr")
    return AotKernel(name, surgery_coefficients_plan_kernel, signature, constants, num_warps=WARPS, vector_loads=False)


_ONCE = (torch.float32,)  # the table is fp64, whatever the gradients were

SPEC = OpSpec(
    name="surgery_coefficients",
    run=_run,
    eager=_eager,
    cases=tuple(
        Case(name, make, _ONCE)
        for name, make in {
            "0 segments": _table(0, max_norm=1.0),
            "1 segment": _table(1),
            "63 segments": _table(63, max_norm=1.0),
            "1000 segments": _table(1000, max_norm=3.0, strength=0.7),
            "thousands": _table(5000, max_norm=1e6),
            "two-sided": _table(300, two_sided=True, max_norm=1.0),
            "released": _table(300, released=True, max_norm=1.0),
            "released, no clip": _table(300, released=True),
            "released, nothing to clip": _table(300, released=True, max_norm=1e6, strength=0.5),
            "rho": _table(300, rho=0.3, max_norm=10.0),
            "preconditioned": _table(300, columns=6, max_norm=1.0),
            "r = 0": _table(300, retain=0.0, max_norm=1.0),
            "r tiny": _table(300, retain=1e-15),
            "NaN": _table(300, damage=float("nan"), max_norm=1.0),
            "Inf": _table(300, damage=float("inf"), two_sided=True),
            "released, -Inf": _table(300, damage=-float("inf"), released=True, max_norm=1.0),
            "coefficient beyond fp32": _table(3, retain=1e-60, two_sided=True),
        }.items()
    ),
    bytes_moved=lambda inputs: 8 * inputs["table"].numel() + 4 * len(inputs["table"]) + 12,
    launches=1,
    kernels=(
        _kernel("one-sided"),
        _kernel("two-sided", two_sided=True),
        _kernel("preconditioned", columns=6),
        _kernel("released", released=True),
    ),
    bench=lambda numel, dtype, device: _table(1680, max_norm=1.0)(torch.Generator().manual_seed(0), dtype, device),
)
