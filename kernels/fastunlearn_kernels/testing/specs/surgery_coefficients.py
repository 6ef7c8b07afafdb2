"""The spec of `surgery_coefficients`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastunlearn_kernels.gradients.surgery_coefficients import (
    BLOCK,
    CLIP_EPS,
    WARPS,
    surgery_coefficients,
    surgery_coefficients_plan_kernel,
)
from fastunlearn_kernels.testing.common.spec import AotKernel, Case, Inputs, OpSpec, Outputs


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
