"""Gradient surgery: the three ops against formulas written out again in fp64, and the properties that it must have.

Everything runs through the reference and through the Triton kernels (interpreted where there is no GPU).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import device
from torch import Tensor

from fastunlearn_kernels.common import backend, scratch
from fastunlearn_kernels.gradients.operands import cut_tensors
from fastunlearn_kernels.gradients.segments import Segments, grouped, per_tensor, whole
from fastunlearn_kernels.gradients.surgery_apply import surgery_apply, surgery_apply_op
from fastunlearn_kernels.gradients.surgery_coefficients import (
    SurgeryPlan,
    surgery_coefficients,
    surgery_coefficients_op,
)
from fastunlearn_kernels.gradients.surgery_dots import surgery_dots, surgery_dots_op
from fastunlearn_kernels.quantize.blockwise_quantize import Quantized
from fastunlearn_kernels.quantize.dynamic_code import dequantize_dynamic, quantize_dynamic
from fastunlearn_kernels.testing.common.gradient_cases import flat_partition, flat_segments, quantized
from fastunlearn_kernels.testing.specs.surgery_apply import SPEC as APPLY
from fastunlearn_kernels.testing.specs.surgery_dots import SPEC as DOTS

DEVICE = device()
BACKENDS = ("reference", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

both = pytest.mark.parametrize("name", BACKENDS)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "POISON", True)


# --- the same in fp64, written out ------------------------------------------------------------------------------------


def parts(tensors: Sequence[Tensor], segments: Segments) -> list[list[float]]:
    """The elements of each segment, as numbers."""
    out: list[list[float]] = [[] for _ in range(segments.count)]
    for tensor, begin, end, segment in segments.pieces:
        out[segment] += tensors[tensor].double().reshape(-1)[begin:end].tolist()
    return out


def dot(a: Sequence[float], b: Sequence[float], weight: Sequence[float] | None = None) -> float:
    if weight is None:
        return math.fsum(x * y for x, y in zip(a, b, strict=True))
    return math.fsum(x * y * w for x, y, w in zip(a, b, weight, strict=True))


def values_of(retain: list[Tensor] | Quantized | None, like: Sequence[Tensor]) -> list[Tensor]:
    """A retain gradient in fp64, element by element where it is quantised."""
    if retain is None:
        return [torch.zeros_like(u, dtype=torch.float64) for u in like]
    if not isinstance(retain, Quantized):
        return [r.double() for r in retain]
    out = []
    for codes, absmax in zip(*retain):
        scales = absmax.tolist()
        numbers = [code * scales[i // 256] / 127 for i, code in enumerate(codes.reshape(-1).tolist())]
        out.append(torch.tensor(numbers, dtype=torch.float64, device=codes.device).view(codes.shape))
    return out


def norm(vectors: Sequence[Sequence[float]]) -> float:
    return math.sqrt(math.fsum(x * x for vector in vectors for x in vector))


def surgery(
    u: list[list[float]], r: list[list[float]], *, weight: list[list[float]] | None = None, strength: float = 1.0,
    two_sided: bool = False, released: bool = False, rho: float = 0.0, max_norm: float | None = None,
) -> list[list[float]]:  # fmt: skip
    """The corrected gradients of each segment, by the book."""
    if released:
        before = min(1.0, max_norm / norm(u)) if max_norm is not None and norm(u) > 0 else 1.0
        u = [[before * x for x in a] for a in u]
    out = []
    for k, (a, b) in enumerate(zip(u, r, strict=True)):
        inner, square = (dot(x, b, weight[k] if weight else None) for x in (a, b))
        factor = -rho * (before if released else 1.0)
        if square > 0 and (two_sided or inner < 0):
            length = math.sqrt(dot(a, a)) if released else 1.0
            factor += strength * inner / square / (length or 1.0)
        out.append([x - factor * y for x, y in zip(a, b, strict=True)])
    if max_norm is not None and not released:
        scale = min(1.0, max_norm / (norm(out) + 1e-6))
        out = [[scale * x for x in a] for a in out]
    return out


# --- drawing and running ----------------------------------------------------------------------------------------------


def vectors(
    seed: int, sizes: Sequence[int], correlation: float, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Unlearn and retain gradients (fp32) of a given correlation."""
    draw = torch.Generator().manual_seed(seed)
    unlearn, retain = [], []
    for size in sizes:
        u, other = torch.randn(2, size, generator=draw).unbind(0)
        u = u.to(dtype)
        unlearn.append(u.to(DEVICE))
        retain.append((correlation * u.float() + math.sqrt(1 - correlation**2) * other).to(DEVICE))
    return unlearn, retain


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def operate(
    name: str,
    unlearn: Sequence[Tensor],
    retain: Any,
    segments: Segments,
    *,
    moment: Any = None,
    eps: float = 1e-8,
    **options: Any,
) -> tuple[list[Tensor], SurgeryPlan, Tensor]:
    """(corrected copies, plan, table)."""
    out = clones(unlearn)
    with backend.force(name):
        table = surgery_dots(out, retain, segments, second_moment=moment, eps=eps)
        plan = surgery_coefficients(table, **options)
        surgery_apply(out, retain, segments, plan)
    return out, plan, table


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.double().reshape(-1) for t in tensors]) if tensors else torch.zeros(0, dtype=torch.float64)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(bits(x), bits(y)) for x, y in pairs)


def tolerance(u: Sequence[Tensor], r: Sequence[Tensor]) -> list[float]:
    """By how much rounding u to its dtype can change <u, r>, and fp32's own rounding, per tensor."""
    eps = EPS[u[0].dtype] if u else 0.0
    return [2 * (eps + 4e-6) * float(a.double().norm() * b.double().norm()) + 1e-30 for a, b in zip(u, r)]


SIZES = st.lists(st.sampled_from((0, 1, 2, 7, 16, 63, 64, 300)), min_size=1, max_size=4)
CORRELATION = st.floats(-0.99, 0.99)
SEED = st.integers(0, 2**31)
few = settings(max_examples=8, deadline=None, derandomize=True, database=None)


# --- against the book -------------------------------------------------------------------------------------------------


def mixed(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], Segments]:
    """Tensors in groups: conflicting, agreeing, empty, alone; correlation by tensor."""
    unlearn, retain = [], []
    for seed, (size, correlation) in enumerate([(5, -0.9), (0, 0.0), (300, 0.3), (63, -0.2), (2100, -0.05), (16, 0.9)]):
        u, r = vectors(seed, [size], correlation, dtype)
        unlearn += u
        retain += r
    return unlearn, retain, grouped(unlearn, [0, 0, 1, 2, 0, 3], count=5)


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "none"])
def test_dots_equal_sums_of_products(name: str, dtype: torch.dtype, kind: str) -> None:
    unlearn, other, segments = mixed(dtype)
    retain = {"fp32": other, "bf16": [r.bfloat16() for r in other], "int8": quantized(other), "none": None}[kind]
    with backend.force(name):
        table = surgery_dots(unlearn, retain, segments)
    assert table.shape == (5, 3) and table.dtype == torch.float64
    for row, a, b in zip(table.tolist(), parts(unlearn, segments), parts(values_of(retain, unlearn), segments)):
        for got, (x, y) in zip(row, ((a, a), (a, b), (b, b))):
            absolute = math.fsum(abs(p * q) for p, q in zip(x, y))
            assert abs(got - dot(x, y)) <= 2.5e-6 * absolute  # the stated bound, and a little for r in 8 bits


@both
@pytest.mark.parametrize("eight_bit", [False, True])
def test_preconditioned_dots_equal_weighted_sums(name: str, eight_bit: bool) -> None:
    unlearn, retain, segments = mixed()
    v = [10 ** (-4 * torch.rand_like(u)) * (torch.rand_like(u) > 0.2) for u in unlearn]
    moment, values = v, v
    if eight_bit:
        packed = [quantize_dynamic(x, signed=False) for x in v]
        moment = ([codes for codes, _ in packed], [absmax for _, absmax in packed])  # type: ignore[assignment]
        values = [dequantize_dynamic(*pair, signed=False, dtype=torch.float64) for pair in packed]
    with backend.force(name):
        table = surgery_dots(unlearn, retain, segments, second_moment=moment, eps=1e-2)
    weights = [[1 / (math.sqrt(x) + 1e-2) for x in part] for part in parts(values, segments)]
    for row, a, b, w in zip(table.tolist(), parts(unlearn, segments), parts(retain, segments), weights):
        for got, (x, y, z) in zip(row, ((a, a, None), (a, b, None), (b, b, None), (a, a, w), (a, b, w), (b, b, w))):
            absolute = math.fsum(abs(p * q) * (z[i] if z else 1) for i, (p, q) in enumerate(zip(x, y)))
            assert abs(got - dot(x, y, z)) <= 4e-6 * absolute


OPTIONS = {
    "plain": {},
    "half strength": {"strength": 0.5},
    "two-sided": {"two_sided": True},
    "clip": {"max_norm": 1.5},
    "two-sided, clip": {"two_sided": True, "max_norm": 1.5},
    "nothing to clip": {"max_norm": 1e6},
    "rho": {"rho": 0.2, "max_norm": 3.0},
    "released": {"released": True, "max_norm": 1.0},
    "released, small": {"released": True, "max_norm": 1e6, "strength": 0.8},
    "released, no clip": {"released": True},
    "released, rho": {"released": True, "max_norm": 1.0, "rho": 0.1},
}


@both
@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_surgery_equals_the_formula(name: str, options: dict, kind: str) -> None:
    unlearn, other, segments = mixed()
    retain = quantized(other) if kind == "int8" else other
    out, plan, _ = operate(name, unlearn, retain, segments, **options)
    wanted = surgery(parts(unlearn, segments), parts(values_of(retain, unlearn), segments), **options)
    for got, exact in zip(parts(out, segments), wanted, strict=True):
        largest = max((abs(x) for x in exact), default=0.0)
        assert all(abs(x - y) <= 3e-6 * largest for x, y in zip(got, exact, strict=True))
    assert plan.found_inf == 0 and {t.dtype for t in plan} == {torch.float32}


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    # Triton's interpreter cuts fp32 off where a GPU rounds to bf16.
    cuts_off = name == "triton" and backend.INTERPRETED and dtype == torch.bfloat16
    rounding = EPS[dtype] if cuts_off else EPS[dtype] / 2
    unlearn, retain, segments = mixed(dtype)
    out, _, _ = operate(name, unlearn, retain, segments, max_norm=20.0)
    wanted = surgery(parts(unlearn, segments), parts(retain, segments), max_norm=20.0)
    for got, exact in zip(parts(out, segments), wanted, strict=True):
        largest = max((abs(x) for x in exact), default=0.0)
        assert all(abs(x - y) <= rounding * abs(y) + 3e-6 * largest for x, y in zip(got, exact))


@both
def test_preconditioned_coefficients_with_the_plain_norm(name: str) -> None:
    unlearn, retain, segments = mixed()
    v = [torch.rand_like(u) for u in unlearn]
    out, _, _ = operate(name, unlearn, retain, segments, moment=v, eps=1e-2, max_norm=1.5)
    weight = [[1 / (math.sqrt(x) + 1e-2) for x in part] for part in parts(v, segments)]
    wanted = surgery(parts(unlearn, segments), parts(retain, segments), weight=weight, max_norm=1.5)
    for got, exact in zip(parts(out, segments), wanted, strict=True):
        assert got == pytest.approx(exact, rel=1e-4, abs=1e-6)


# --- properties -------------------------------------------------------------------------------------------------------


@both
@given(sizes=SIZES, seed=SEED, correlation=CORRELATION, dtype=st.sampled_from(DTYPES), eight_bit=st.booleans())
@few
def test_nothing_points_against_the_retain_gradient(
    name: str, sizes: list[int], seed: int, correlation: float, dtype: torch.dtype, eight_bit: bool
) -> None:
    unlearn, other = vectors(seed, sizes, correlation, dtype)
    retain = quantized(other) if eight_bit else other
    out, _, _ = operate(name, unlearn, retain, per_tensor(unlearn))
    values = values_of(retain, unlearn)
    for u, r, allowed in zip(out, values, tolerance(unlearn, values)):
        assert (u.double() @ r).item() >= -allowed


@both
@given(sizes=SIZES, seed=SEED, correlation=CORRELATION, dtype=st.sampled_from(DTYPES))
@few
def test_two_sided_leaves_nothing_along_the_retain_gradient(
    name: str, sizes: list[int], seed: int, correlation: float, dtype: torch.dtype
) -> None:
    unlearn, retain = vectors(seed, sizes, correlation, dtype)
    out, _, _ = operate(name, unlearn, retain, per_tensor(unlearn), two_sided=True)
    for u, r, allowed in zip(out, retain, tolerance(unlearn, retain)):
        assert abs((u.double() @ r.double()).item()) <= allowed


@both
@given(sizes=SIZES, seed=SEED, correlation=CORRELATION)
@few
def test_the_preconditioned_step_does_not_raise_the_retain_loss(
    name: str, sizes: list[int], seed: int, correlation: float
) -> None:
    unlearn, retain = vectors(seed, sizes, correlation, torch.float32)
    v = [10 ** (-6 * torch.rand_like(u)) for u in unlearn]
    out, _, _ = operate(name, unlearn, retain, per_tensor(unlearn), moment=v, eps=1e-4)
    for u, r, before, x in zip(out, retain, unlearn, v):
        root = (1 / (x.double().sqrt() + 1e-4)).sqrt()
        allowed = 1e-5 * ((before * root).norm() * (r * root).norm()).item() + 1e-30
        assert (u * root).double() @ (r * root).double() >= -allowed


@both
@given(sizes=SIZES, seed=SEED, correlation=st.floats(0.5, 0.99), dtype=st.sampled_from(DTYPES))
@few
def test_without_conflict_every_bit_stays(
    name: str, sizes: list[int], seed: int, correlation: float, dtype: torch.dtype
) -> None:
    unlearn, _ = vectors(seed, sizes, 0.0, dtype)
    retain = [u.float() * (0.1 + torch.rand_like(u.float())) for u in unlearn]
    out, plan, _ = operate(name, unlearn, retain, per_tensor(unlearn), max_norm=1e6)
    assert same_bits(out, unlearn) and plan.scale == 1 and not plan.coef_S.any()


@both
@given(sizes=SIZES, seed=SEED, correlation=CORRELATION, factor=st.sampled_from((2.0**-20, 0.5, 2.0**15, 0.3, 7e4)))
@few
def test_the_scale_of_the_retain_gradient_does_not_matter(
    name: str, sizes: list[int], seed: int, correlation: float, factor: float
) -> None:
    unlearn, retain = vectors(seed, sizes, correlation, torch.float32)
    once, _, _ = operate(name, unlearn, retain, per_tensor(unlearn), max_norm=2.0)
    other, _, _ = operate(name, unlearn, [factor * r for r in retain], per_tensor(unlearn), max_norm=2.0)
    if math.frexp(factor)[0] == 0.5:  # a power of two: nothing is rounded differently
        assert same_bits(once, other)
    torch.testing.assert_close(flat(once), flat(other), rtol=0, atol=1e-5)


@both
@given(sizes=SIZES, seed=SEED, correlation=CORRELATION, pad=st.integers(0, 20), reverse=st.booleans())
@few
def test_cuts_padding_and_order_do_not_matter(
    name: str, sizes: list[int], seed: int, correlation: float, pad: int, reverse: bool
) -> None:
    unlearn, retain = vectors(seed, sizes, correlation, torch.float32)
    wanted, _, _ = operate(name, unlearn, retain, whole(unlearn), max_norm=2.0)
    # The same elements in one buffer, in another order, with rubbish between them, each tensor in two pieces.
    order = list(range(len(sizes)))[:: -1 if reverse else 1]
    rubbish = torch.full((pad,), float("nan"), device=DEVICE)
    buffers = [torch.cat([t for i in order for t in (rubbish, tensors[i])]) for tensors in (unlearn, retain)]
    pieces, begin = [], 0
    for i in order:
        begin += pad
        middle = begin + sizes[i] // 3
        pieces += [(0, middle, begin + sizes[i], 0), (0, begin, middle, 0)]
        begin += sizes[i]
    out, plan, _ = operate(name, buffers[:1], buffers[1:], Segments(tuple(pieces), 1), max_norm=2.0)
    found = torch.cat([out[0][:0]] + [out[0][begin:end] for _, begin, end, _ in sorted(pieces)])
    expected = torch.cat([wanted[i] for i in order])
    assert plan.found_inf == 0 and out[0].isnan().sum() == pad * len(sizes)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-6)


@both
@given(sizes=SIZES, seed=SEED, correlation=CORRELATION, strength=st.floats(0, 2), two_sided=st.booleans())
@few
def test_surgery_never_lengthens_and_knows_its_norm(
    name: str, sizes: list[int], seed: int, correlation: float, strength: float, two_sided: bool
) -> None:
    unlearn, retain = vectors(seed, sizes, correlation, torch.float32)
    segments = per_tensor(unlearn)
    out, plan, _ = operate(name, unlearn, retain, segments, strength=strength, two_sided=two_sided)
    for u, before in zip(out, unlearn):
        assert u.double().norm() <= before.double().norm() * (1 + 3e-6)
    assert abs(plan.norm.item() ** 2 - flat(out).norm().item() ** 2) <= 1e-5 * flat(unlearn).norm().item() ** 2
    clipped, _, _ = operate(name, unlearn, retain, segments, strength=strength, two_sided=two_sided, max_norm=0.7)
    assert flat(clipped).norm() <= max(0.7 * (1 + 1e-5), 3e-3 * flat(unlearn).norm())
    assert flat(clipped).norm() >= min(0.69, 0.99 * flat(out).norm() - 3e-3 * flat(unlearn).norm())


@both
@given(sizes=SIZES, seed=SEED, dtype=st.sampled_from(DTYPES), released=st.booleans())
@few
def test_a_retain_gradient_of_zeros_changes_nothing(
    name: str, sizes: list[int], seed: int, dtype: torch.dtype, released: bool
) -> None:
    unlearn, _ = vectors(seed, sizes, 0.0, dtype)
    zeros = [torch.zeros_like(u) for u in unlearn]
    for retain in (zeros, quantized(zeros), None):
        out, plan, _ = operate(name, unlearn, retain, per_tensor(unlearn), released=released, two_sided=True)
        assert plan.found_inf == 0 and same_bits(out, unlearn)
    none, _, _ = operate(name, zeros, unlearn, per_tensor(unlearn), released=released, max_norm=1.0)
    assert same_bits(none, zeros)


@both
@given(sizes=SIZES, seed=SEED, correlation=CORRELATION, strength=st.floats(0.1, 2))
@few
def test_released_is_the_published_rule(
    name: str, sizes: list[int], seed: int, correlation: float, strength: float
) -> None:
    unlearn, retain = vectors(seed, sizes, correlation, torch.float32)
    out, _, _ = operate(name, unlearn, retain, per_tensor(unlearn), released=True, strength=strength, max_norm=1.0)
    total = flat(unlearn).norm().item()
    for got, u, r in zip(out, unlearn, retain):
        exact, r = u.double() * min(1.0, 1.0 / total if total else 1.0), r.double()
        if u.numel() and exact @ r < 0:
            cosine = (exact @ r) / (exact.norm() * r.norm())
            exact = exact - strength * cosine * r / r.norm()
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)


@both
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["unlearn", "retain", "absmax"])
def test_what_is_not_finite_skips_every_tensor(name: str, where: str, bad: float) -> None:
    unlearn, other = vectors(3, [40, 300, 7], -0.5, torch.bfloat16)
    retain = quantized(other) if where == "absmax" else other
    {"unlearn": unlearn, "retain": other, "absmax": retain[1]}[where][1][0] = bad
    out, plan, table = operate(name, unlearn, retain, per_tensor(unlearn), max_norm=0.1, rho=0.1)
    assert plan.found_inf == 1 and plan.scale == 1 and not plan.coef_S.any() and plan.norm == float("inf")
    assert same_bits(out, unlearn) and table[0].isfinite().all() and not table[1].isfinite().all()


@both
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_squares_beyond_fp32_skip_the_step_and_tiny_ones_leave_u_alone(name: str) -> None:
    unlearn, retain = vectors(0, [300], -0.5, torch.float32)
    with backend.force(name):
        ours = surgery_dots([u * 1e16 for u in unlearn], retain, per_tensor(unlearn))
        assert surgery_coefficients(ours).found_inf == 0
    out, plan, _ = operate(name, unlearn, [r * 1e-30 for r in retain], per_tensor(unlearn))
    assert plan.found_inf == 0 and flat(out).isfinite().all()
    out, plan, _ = operate("triton", [u * 1e20 for u in unlearn], retain, per_tensor(unlearn))
    assert plan.found_inf == 1 and same_bits(out, [u * 1e20 for u in unlearn])


@both
def test_nothing_is_touched_that_need_not_be(name: str) -> None:
    """Segment 0 conflicts, 1 does not, the rest is padding: with NaN where nobody may look."""
    unlearn, retain = vectors(1, [3000], -0.5, torch.float32)
    unlearn[0][1000:2000].mul_(-1)
    segments = flat_segments([0, 1000, 2000])
    with backend.force(name):
        plan = surgery_coefficients(surgery_dots(unlearn, retain, segments))
        assert plan.coef_S[0] != 0 and plan.coef_S[1] == 0
        retain[0][1000:] = float("nan")
        unlearn[0][1500:2500] = float("nan")
        out = clones(unlearn)
        surgery_apply(out, retain, segments, plan)
        assert same_bits([out[0][1000:]], [unlearn[0][1000:]]) and not torch.equal(out[0][:1000], unlearn[0][:1000])
        surgery_apply(out, retain, segments, plan._replace(scale=plan.scale / 2))
    assert out[0][1000:1500].isfinite().all() and same_bits([out[0][2000:]], [unlearn[0][2000:]])


# --- many, odd, repeated ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "every"), [("reference", 1), ("triton", 40)])
def test_thousands_of_tensors(name: str, every: int) -> None:
    """Interpreted, most of them are empty, since a program takes milliseconds."""
    sizes = [1 + i % 5 if i % every == 0 else 0 for i in range(3000)]
    unlearn, retain = vectors(0, sizes, -0.3, torch.float32)
    segments = grouped(unlearn, [i * 4 // 3000 for i in range(3000)])
    out, _, _ = operate(name, unlearn, retain, segments, max_norm=2.0)
    wanted = surgery(parts(unlearn, segments), parts(retain, segments), max_norm=2.0)
    for got, exact in zip(parts(out, segments), wanted, strict=True):
        assert got == pytest.approx(exact, rel=1e-5, abs=1e-6)


@both
@pytest.mark.parametrize("segments", [0, 1, 3000])
def test_coefficients_of_any_number_of_segments(name: str, segments: int) -> None:
    u, r = torch.randn(2, segments, 10, dtype=torch.float64)
    table = torch.stack([(u * u).sum(1), (u * r).sum(1), (r * r).sum(1)], 1).to(DEVICE)
    with backend.force(name):
        plan = surgery_coefficients(table, max_norm=2.0)
    coef = [min(0.0, ur) / rr for _, ur, rr in table.tolist()]
    total = math.fsum(uu - 2 * c * ur + c * c * rr for c, (uu, ur, rr) in zip(coef, table.tolist()))
    assert plan.coef_S.tolist() == pytest.approx(coef, rel=1e-6)
    assert plan.norm.item() == pytest.approx(math.sqrt(total), rel=1e-6)
    assert plan.scale.item() == pytest.approx(min(1.0, 2.0 / (math.sqrt(total) + 1e-6)), rel=1e-6)


@both
def test_lists_without_tensors(name: str) -> None:
    with backend.force(name):
        table = surgery_dots([], None, Segments((), 2))
        assert torch.equal(table, torch.zeros(2, 3, dtype=torch.float64))
        surgery_apply([], [], Segments((), 2), surgery_coefficients(table))


@both
@pytest.mark.parametrize("layout", ["transposed", "strided", "channels last", "unaligned"])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_layouts_give_what_contiguous_copies_give(name: str, layout: str, cut: bool, eight_bit: bool) -> None:
    def laid_out(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "channels last":
            return t.contiguous(memory_format=torch.channels_last)
        if layout == "unaligned":
            return torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape)
        return torch.stack([t, t], -1)[..., 0]

    values = torch.randn(2, 3, 4, 5, 6, device=DEVICE)
    unlearn, retain = [values[0]], [values[1] - values[0]]
    segments = Segments(((0, 0, 77, 0), (0, 77, 360, 1)), 2) if cut else per_tensor(unlearn)
    odd, kept = [laid_out(t) for t in unlearn], quantized(retain) if eight_bit else [laid_out(t) for t in retain]
    assert torch.equal(odd[0], unlearn[0]) and (layout == "unaligned" or not odd[0].is_contiguous())
    with backend.force(name):
        plan = surgery_coefficients(surgery_dots(odd, kept, segments), max_norm=3.0)
        surgery_apply(odd, kept, segments, plan)
    wanted, _, _ = operate("reference", unlearn, quantized(retain) if eight_bit else retain, segments, max_norm=3.0)
    torch.testing.assert_close(odd[0], wanted[0], rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_equal_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    unlearn, other, segments = mixed(dtype)
    runs = [operate(name, unlearn, quantized(other), segments, max_norm=1.0) for _ in range(2)]
    for first, second in zip(*([*out, *plan, table] for out, plan, table in runs)):
        assert same_bits([first], [second])


# --- as registered ops ------------------------------------------------------------------------------------------------


def op_arguments() -> Iterator[tuple]:
    unlearn, other = vectors(0, [40, 0, 300], -0.3, torch.float32)
    pieces, count = per_tensor(unlearn).flat(), 3
    codes, absmax = quantized(other)
    v = [torch.rand_like(u) for u in unlearn]
    table = surgery_dots(unlearn, other, per_tensor(unlearn))
    coef_S, scale, found_inf, _ = surgery_coefficients(table, max_norm=1.0)
    yield surgery_dots_op, (unlearn, other, [], [], [], pieces, count, 1e-8)
    yield surgery_dots_op, (unlearn, codes, absmax, v, [], pieces, count, 1e-8)
    yield surgery_dots_op, (unlearn, [], [], [], [], pieces, count, 1e-8)
    yield surgery_coefficients_op, (table, 1.0, False, False, 0.0, 1.0)
    yield surgery_apply_op, (unlearn, other, [], coef_S, scale, found_inf, pieces, count)
    yield surgery_apply_op, (unlearn, codes, absmax, coef_S, scale, found_inf, pieces, count)
    yield surgery_apply_op, (unlearn, [], [], coef_S, scale, found_inf, pieces, count)


@both
def test_opcheck(name: str) -> None:
    with backend.force(name):
        for op, arguments in op_arguments():
            torch.library.opcheck(op, arguments)


@both
@pytest.mark.parametrize("eight_bit", [False, True])
def test_surgery_compiles_in_one_graph(name: str, eight_bit: bool) -> None:
    unlearn, other = vectors(0, [40, 0, 300], -0.3, torch.bfloat16)
    retain = quantized(other) if eight_bit else other
    segments = per_tensor(unlearn)

    def step(unlearn: list[Tensor], retain: Any) -> Tensor:
        plan = surgery_coefficients(surgery_dots(unlearn, retain, segments), max_norm=1.0)
        surgery_apply(unlearn, retain, segments, plan)
        return plan.norm

    torch._dynamo.reset()
    wanted, got = clones(unlearn), clones(unlearn)
    with backend.force(name):
        norm = step(wanted, retain)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(got, retain)
    assert torch.equal(norm, compiled) and same_bits(got, wanted) and not same_bits(got, unlearn)


def test_bytes_moved_counts_each_operand_once() -> None:
    inputs = flat_partition(65536, torch.bfloat16, DEVICE)
    assert DOTS.bytes_moved(inputs) == 65536 * 2 + 65536 + 65536 // 256 * 4
    inputs["plan"] = SurgeryPlan(torch.ones(16), torch.ones(()), torch.zeros(()), torch.ones(()))
    assert APPLY.bytes_moved(inputs) == 65536 * 4 + 65536 + 65536 // 256 * 4
    inputs["plan"] = inputs["plan"]._replace(coef_S=torch.zeros(16))
    assert APPLY.bytes_moved(inputs) == 0
    inputs["plan"] = inputs["plan"]._replace(scale=torch.tensor(0.5))
    assert APPLY.bytes_moved(inputs) == 65536 * 4
    narrow = {"unlearn": [torch.zeros(1000)], "retain": None, "segments": flat_segments([0, 10, 90])}
    assert DOTS.bytes_moved(narrow) == 90 * 4


def test_wrong_arguments_are_refused() -> None:
    u, r = vectors(0, [40, 8], 0.0, torch.float32)
    segments = per_tensor(u)
    table = surgery_dots(u, r, segments)
    with pytest.raises(ValueError, match="mixes dtypes"):
        surgery_dots([u[0], u[1].half()], r, segments)
    with pytest.raises(ValueError, match="has 1 tensors"):
        surgery_dots(u, r[:1], segments)
    with pytest.raises(ValueError, match="has shape"):
        surgery_dots(u, r[::-1], segments)
    with pytest.raises(ValueError, match="retain has dtype"):
        surgery_dots(u, [t.long() for t in r], segments)
    with pytest.raises(ValueError, match="absmax"):
        surgery_dots(u, Quantized([t.to(torch.int8) for t in r], [torch.ones(1), torch.ones(2)]), segments)
    with pytest.raises(ValueError, match="eps"):
        surgery_dots(u, r, segments, second_moment=r, eps=0.0)
    with pytest.raises(ValueError, match="expected a float64 table"):
        surgery_coefficients(table.float())
    with pytest.raises(ValueError, match="max_norm"):
        surgery_coefficients(table, max_norm=0.0)
    with pytest.raises(ValueError, match="preconditioned"):
        surgery_coefficients(surgery_dots(u, r, segments, second_moment=[t.abs() for t in r]), released=True)
    with pytest.raises(ValueError, match="coefficients for 2"):
        surgery_apply(u, r, segments, surgery_coefficients(table[:1]))
    for pieces in [((0, 0, 41, 0),), ((2, 0, 1, 0),), ((0, -1, 1, 0),), ((0, 0, 1, 2),), ((0, 0, 9, 0), (0, 8, 40, 1))]:
        with pytest.raises(ValueError, match=r"piece"):
            surgery_dots(u, r, Segments(pieces, 2))


def test_cut_tensors_names_those_in_several_pieces() -> None:
    tensors = [torch.zeros(5), torch.zeros(8), torch.zeros(0), torch.zeros(3)]
    assert cut_tensors(tensors, (0, 0, 5, 0, 1, 0, 3, 0, 1, 3, 8, 1, 2, 0, 0, 1, 3, 1, 3, 0), 2) == {1, 3}
    assert cut_tensors([], (), 0) == frozenset()
