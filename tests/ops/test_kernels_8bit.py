"""The 8-bit ops: number formats, quantised gradients, AdamW8bit, against formulas written out again and bitsandbytes.

The cases of the specs are run by test_kernels_ops.py; here are the properties that belong to these ops alone.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import device
from torch import Tensor, nn

from fastunlearn_kernels.adamw8bit import step as step_module
from fastunlearn_kernels.adamw8bit.optimizer import WRAPPED, AdamW8bit
from fastunlearn_kernels.adamw8bit.step import adamw8bit_step, adamw8bit_step_op
from fastunlearn_kernels.common import backend, scratch
from fastunlearn_kernels.common.rounding import rounding_halves, rounding_halves_tile
from fastunlearn_kernels.gradients.segments import per_tensor, whole
from fastunlearn_kernels.gradients.surgery_apply import surgery_apply
from fastunlearn_kernels.gradients.surgery_coefficients import SurgeryPlan
from fastunlearn_kernels.quantize.block_chunks import block_chunks_of_pieces
from fastunlearn_kernels.quantize.blockwise_quantize import (
    Quantized,
    blockwise_dequantize,
    blockwise_dequantize_op,
    blockwise_quantize,
    blockwise_quantize_op,
)
from fastunlearn_kernels.quantize.dynamic_code import (
    dequantize_dynamic,
    dynamic_map,
    inverse_absmax,
    nearest_code,
    quantize_dynamic,
    quantize_tile,
)
from fastunlearn_kernels.testing.common.gradient_cases import flat_segments
from fastunlearn_kernels.testing.common.spec import copied
from fastunlearn_kernels.testing.specs.adamw8bit_step import SPEC, bench_step, inputs_of
from fastunlearn_kernels.testing.specs.blockwise_quantize import tensor_list

DEVICE = device()
BACKENDS = ("reference", "triton")
EPS = 2.0**-23

both = pytest.mark.parametrize("name", BACKENDS)
signs = pytest.mark.parametrize("signed", (True, False), ids=("signed", "unsigned"))


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "POISON", True)


def plan_of(coef: Sequence[float], scale: float = 1.0, found_inf: float = 0.0) -> SurgeryPlan:
    return SurgeryPlan(*[torch.tensor(x, device=DEVICE) for x in (list(coef), scale, found_inf, 1.0)])


# --- the dynamic map --------------------------------------------------------------------------------------------------


@signs
def test_map_is_that_of_bitsandbytes_bit_for_bit(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed=signed))


@triton.jit
def _codes_kernel(x_ptr, absmax_ptr, out_ptr, n, SIGNED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < n, other=0.0)
    inverse = inverse_absmax(tl.load(absmax_ptr + o, mask=o < n, other=1.0))
    tl.store(out_ptr + o, quantize_tile(x, inverse, SIGNED), mask=o < n)


def kernel_codes(x: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    out = torch.empty(len(x), dtype=torch.uint8, device=DEVICE)
    scales = absmax.expand(len(x)).contiguous().to(DEVICE)
    _codes_kernel[(triton.cdiv(len(x), 4096),)](x.to(DEVICE), scales, out, len(x), SIGNED=signed, BLOCK=4096)
    return out.cpu()


def around(values: Tensor, steps: int = 30) -> Tensor:
    """The values, and their neighbours in fp32."""
    out, up, down = [values], values, values
    for _ in range(steps):
        up, down = torch.nextafter(up, torch.tensor(9.0)), torch.nextafter(down, torch.tensor(-9.0))
        out += [up, down]
    return torch.cat(out)


@signs
def test_kernel_codes_are_the_nearest_at_every_border(signed: bool) -> None:
    values = dynamic_map(signed)
    borders = ((values[1:].double() + values[:-1].double()) / 2).float()
    decades = 10.0 ** -torch.arange(9.0)
    random = torch.cat([torch.rand(20000), 10 ** (-8 * torch.rand(20000)), torch.zeros(2), torch.ones(2)])
    y = torch.cat([around(torch.cat([borders, values, decades, -decades])), random, -random])
    y = y.clamp(-1, 1) if signed else y.abs().clamp(max=1)
    codes = kernel_codes(y, torch.ones(1), signed)
    distance = (values.double()[codes.long()] - y.double()).abs()
    nearest = (values.double()[nearest_code(y, signed).long()] - y.double()).abs()
    # As near as for a y that is off by 2^-22 of its decade's upper end.
    decade = 10.0 ** y.double().abs().clamp(min=1e-7).log10().ceil()
    assert (distance <= nearest + 4 * EPS * decade + 1e-9).all()
    exact = kernel_codes(values[values >= -1], torch.ones(1), signed)
    assert torch.equal(exact, torch.arange(256, dtype=torch.uint8)), "a value of the map does not keep its code"


@signs
def test_largest_of_a_block_never_wraps_around(signed: bool) -> None:
    """absmax / absmax may round above 1; there is no code for -1, and none above 1."""
    random = torch.rand(200) * 10 ** (60 * torch.rand(200) - 30)
    absmax = torch.cat([random, torch.tensor([2.0**-126, 3e38])])
    for x, code in ((absmax, 255), (-absmax if signed else 0 * absmax, 0), (0 * absmax, 127 if signed else 0)):
        codes = kernel_codes(x, absmax, signed)
        assert (codes == code).all(), absmax[codes != code]


@signs
def test_blocks_agree_with_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = tensor_list(torch.Generator().manual_seed(0), [(5000,)], torch.float32, torch.device("cpu"))[0]
    x = x if signed else x.square()
    codes, absmax = quantize_dynamic(x, signed)
    theirs, state = functional.quantize_blockwise(x, code=dynamic_map(signed).clone(), blocksize=256)
    torch.testing.assert_close(absmax, state.absmax)
    # What they code is decoded as they decode it, and nothing is coded worse (their search on CPU is not exact).
    decoded = functional.dequantize_blockwise(theirs, state)
    torch.testing.assert_close(dequantize_dynamic(theirs, state.absmax, signed), decoded, rtol=1e-6, atol=0)
    ours, scale = dequantize_dynamic(codes, absmax, signed), absmax.repeat_interleave(256)[: len(x)]
    assert ((ours - x).abs() <= (decoded - x).abs() + 1e-7 * scale).all()
    assert (codes == theirs).float().mean() > 0.5


@signs
def test_tiny_zero_and_infinite_blocks_stay_what_they_are(signed: bool) -> None:
    x = torch.zeros(5 * 256)
    x[256:512] = 1e-40
    x[600], x[900] = math.inf, math.nan
    codes, absmax = quantize_dynamic(x, signed)
    back = dequantize_dynamic(codes, absmax, signed)
    assert not back[:256].any() and (back[256:512] - x[256:512]).abs().max() < 1.2e-38
    assert not back[512:768].isfinite().any() or absmax[2].isinf()
    assert back[768:1024].isnan().all() and not back[1024:].any()


# --- int8 gradients ---------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_linear_codes_keep_their_error_bound(name: str, dtype: torch.dtype) -> None:
    tensors = tensor_list(torch.Generator().manual_seed(3), [(3000,), (40, 33)], dtype, DEVICE)
    for stochastic, part in ((False, 254), (True, 127)):
        with backend.force(name):
            kept = blockwise_quantize(tensors, stochastic=stochastic, seed=5)
            back = blockwise_dequantize(kept)
        for x, mine, absmax in zip(tensors, back, kept.absmax):
            scale = absmax.double().repeat_interleave(256)[: x.numel()].view(x.shape)
            error = (mine.double() - x.double()).abs()
            assert (error <= scale / part * (1 + 1e-4)).all()
            top = x.double().abs() == scale
            assert top.any() and (mine[top].double() - x[top].double()).abs().max() <= 2 * EPS * scale.max()


def test_stochastic_codes_are_unbiased_and_repeat() -> None:
    x = torch.linspace(-1, 1, 255, device=DEVICE)
    x = torch.cat([x * 0.37, x.new_tensor([1.0])])
    with backend.force("triton"):
        runs = [blockwise_dequantize(blockwise_quantize([x], stochastic=True, seed=seed))[0] for seed in range(150)]
        again = blockwise_dequantize(blockwise_quantize([x], stochastic=True, seed=7))[0]
    assert torch.equal(again, runs[7]) and not torch.equal(runs[7], runs[8])
    mean, step = torch.stack(runs).double().mean(0), 1 / 127
    # A step's uniform rounding error has a deviation of at most half a step a run.
    assert ((mean - x.double()).abs() <= 5 * 0.5 * step / math.sqrt(150)).all()
    assert (mean - x.double()).mean().abs() <= 4 * 0.5 * step / math.sqrt(150 * 256)


@both
def test_codes_of_a_list_are_placed_for_vector_loads(name: str) -> None:
    tensors = [torch.randn(s, device=DEVICE) for s in ((7,), (0,), (300,), (2, 5))]
    with backend.force(name):
        kept = blockwise_quantize(tensors)
    assert all(codes.shape == t.shape and codes.dtype == torch.int8 for codes, t in zip(kept.codes, tensors))
    starts = [codes.storage_offset() for codes in kept.codes]
    assert starts == [0, 256, 256, 768] and [len(s) for s in kept.absmax] == [1, 0, 2, 1]
    assert blockwise_quantize([]) == ([], []) and blockwise_dequantize(Quantized([], [])) == []


@both
def test_strided_gradients_are_quantised_in_logical_order(name: str) -> None:
    x = torch.randn(64, 24, device=DEVICE)
    with backend.force(name):
        one, other = blockwise_quantize([x.mT]), blockwise_quantize([x.mT.contiguous()])
    assert torch.equal(one.codes[0], other.codes[0]) and torch.equal(one.absmax[0], other.absmax[0])
    assert one.codes[0].is_contiguous()


@both
def test_linear_blocks_that_hold_nothing_to_scale(name: str) -> None:
    x = torch.randn(5 * 256, device=DEVICE)
    x[:256] = 0
    x[300], x[600] = math.nan, -math.inf
    x[768:1024] *= 1e-42
    with backend.force(name):
        kept = blockwise_quantize([x])
        back = blockwise_dequantize(kept)[0]
    assert kept.absmax[0][0] == 0 and not kept.codes[0][:256].any()
    assert kept.absmax[0][1:3].isnan().all() and back[256:768].isnan().all()
    tiny = (back[768:1024] - x[768:1024]).abs()
    assert (tiny <= kept.absmax[0][3] / 254 * 1.01 + 2e-45).all()
    assert back[1024:].isfinite().all()


# --- rounding ---------------------------------------------------------------------------------------------------------


@triton.jit
def _halves_kernel(out_ptr, first, seed, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    element = first + tl.arange(0, 2).to(tl.int64) * WIDTH
    halves = rounding_halves_tile(first * 0 + seed, element, WIDTH)
    o = tl.arange(0, 2)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out_ptr + o, halves)


@pytest.mark.parametrize("first", (0, 2**32 - 256, 2**40 + 512))
@pytest.mark.parametrize("seed", (0, 1, 2**35 + 9))
def test_kernel_and_reference_draw_the_same_bits_past_32_bits(first: int, seed: int) -> None:
    out = torch.empty(512, dtype=torch.int32, device=DEVICE)
    _halves_kernel[(1,)](out, torch.tensor(first).item() + 0 if first else 0, seed, WIDTH=256)
    wanted = rounding_halves(seed, torch.arange(512) + first)
    assert torch.equal(out.cpu().long(), wanted)
    assert wanted.max() < 2**16 and len(wanted.unique()) > 500


@both
def test_stochastic_rounding_is_unbiased_repeats_and_makes_progress(name: str) -> None:
    """An update of 1/40 of what bf16 resolves: nearest never moves, the mean of stochastic rounding does."""
    n, runs, lr = 256, 40, 2.0**-7 / 40
    moved, results = [], []
    for seed in [*range(runs), 0]:
        p = [torch.ones(n, dtype=torch.bfloat16, device=DEVICE)]
        g = [torch.full((n,), -1.0, dtype=torch.bfloat16, device=DEVICE)]
        state = [[torch.zeros(n, device=DEVICE)] for _ in range(2)]
        with backend.force(name):
            adamw8bit_step(p, g, *state, step=1, lr=lr, weight_decay=0.0, seed=seed)
        results.append(p[0].clone())
        moved.append((p[0].double() - 1).mean().item())
    assert torch.equal(results[0], results[-1]) and not torch.equal(results[0], results[1])
    # Each element moves by 2^-7 with probability 1/40.
    deviation = 2.0**-7 * math.sqrt(1 / 40 / (n * runs))
    assert abs(sum(moved[:runs]) / runs - lr) < 5 * deviation
    p = [torch.ones(n, dtype=torch.bfloat16, device=DEVICE)]
    with backend.force(name):
        adamw8bit_step(p, g, *state, step=1, lr=lr, weight_decay=0.0, stochastic_rounding=False)
    assert (p[0] == 1).all()


def test_both_backends_round_alike() -> None:
    outs = []
    for name in BACKENDS:
        inputs = inputs_of([(700,), (3,), (300,)], seed=11)(torch.Generator().manual_seed(1), torch.bfloat16, DEVICE)
        with backend.force(name):
            adamw8bit_step(**inputs)
        outs.append(inputs)
    # One fp32 unit next to where a sum of bits carries may decide otherwise.
    differing = sum((a != b).sum().item() for a, b in zip(outs[0]["params"], outs[1]["params"]))
    assert differing <= 2


# --- the step ---------------------------------------------------------------------------------------------------------


def step_by_hand(inputs: dict[str, Any]) -> list[tuple[list[float], ...]]:
    """(p, m, v) of each tensor after one step, number by number in Python's floats."""
    out: list[tuple[list[float], ...]] = []
    betas, eps, decay = (0.9, 0.999), 1e-8, 1e-2
    t, lr, plan, segments = inputs["step"], inputs["lr"], inputs.get("plan"), inputs.get("segments", whole([]))
    for i, p in enumerate(inputs["params"]):
        u = inputs["grads"][i].double().reshape(-1).tolist()
        r = [0.0] * len(u)
        if isinstance(inputs.get("retain"), Quantized):
            codes, absmax = (part[i].reshape(-1).tolist() for part in inputs["retain"])
            r = [code * absmax[j // 256] / 127 for j, code in enumerate(codes)]
        elif inputs.get("retain") is not None:
            r = inputs["retain"][i].double().reshape(-1).tolist()
        if plan is not None:
            for tensor, begin, end, segment in segments.pieces:
                for j in range(begin, end) if tensor == i else ():
                    u[j] = (u[j] - plan.coef_S[segment].item() * r[j]) * plan.scale.item()
        moments = []
        for key, scales, signed in (("state1", "absmax1", True), ("state2", "absmax2", False)):
            state = inputs[key][i].reshape(-1).tolist()
            if inputs.get(scales):
                values, absmax = dynamic_map(signed).tolist(), inputs[scales][i].tolist()
                state = [values[code] * absmax[j // 256] for j, code in enumerate(state)]
            moments.append(state)
        m = [betas[0] * a + (1 - betas[0]) * g for a, g in zip(moments[0], u)]
        v = [betas[1] * a + (1 - betas[1]) * g * g for a, g in zip(moments[1], u)]
        new = []
        for j, x in enumerate(p.double().reshape(-1).tolist()):
            root = math.sqrt(v[j] / (1 - betas[1] ** t)) + eps
            new.append(x - lr * decay * x - lr * m[j] / (1 - betas[0] ** t) / root)
        out.append((new, m, v))
    return out


@both
@pytest.mark.parametrize("bits", (8, 32))
@pytest.mark.parametrize("retain", (None, torch.bfloat16, torch.int8), ids=str)
def test_step_is_the_formula(name: str, bits: int, retain: torch.dtype | None) -> None:
    def cut(tensors: Sequence[Tensor]) -> Any:
        return flat_segments([0, 100, 256, 300, 700, 900]) if len(tensors) == 1 else per_tensor(tensors)

    for shapes in ([(1000,)], [(300,), (7, 9), (0,)]):
        make = inputs_of(shapes, bits=bits, retain=retain, segments=cut)
        inputs = make(torch.Generator().manual_seed(2), torch.float32, DEVICE)
        wanted = step_by_hand(inputs)
        with backend.force(name):
            adamw8bit_step(**inputs)
        for i, (p, m, v) in enumerate(wanted):
            ours = inputs["params"][i].double().reshape(-1).cpu()
            torch.testing.assert_close(ours, torch.tensor(p, dtype=torch.float64), rtol=1e-6, atol=2e-6)
            for number, exact in (("1", m), ("2", v)):
                state, exact_t = inputs["state" + number][i].reshape(-1).cpu(), torch.tensor(exact, dtype=torch.float64)
                if bits == 32:
                    torch.testing.assert_close(state.double(), exact_t, rtol=1e-5, atol=1e-9)
                    continue
                absmax = inputs["absmax" + number][i].cpu()
                blocks = torch.nn.functional.pad(exact_t, (0, -len(exact_t) % 256)).view(-1, 256)
                torch.testing.assert_close(absmax.double(), blocks.abs().amax(1) if len(exact_t) else absmax.double())
                back = dequantize_dynamic(state, absmax, number == "1", torch.float64)
                scale = absmax.double().repeat_interleave(256)[: len(back)]
                # Half a cell of the widest decade, 0.9 / 128; unsigned cells are half as wide.
                widest = 0.9 / 128 if number == "1" else 0.9 / 256
                assert ((back - exact_t).abs() <= scale * widest * 1.001).all()


@both
@pytest.mark.parametrize("bits", (8, 32))
def test_fifty_steps_follow_torch_adamw(name: str, bits: int) -> None:
    draw = torch.Generator().manual_seed(4)
    target, curvature = torch.randn(2, 300, generator=draw), 0.5 + torch.rand(2, 300, generator=draw)
    theirs = nn.Parameter(torch.zeros(2, 300))
    ours = nn.Parameter(torch.zeros(2, 300, device=DEVICE))
    options: dict[str, Any] = {"lr": 2e-2, "weight_decay": 1e-2}
    reference = torch.optim.AdamW([theirs], foreach=False, **options)
    optimizer = AdamW8bit([ours], min_8bit_size=1 if bits == 8 else 4096, **options)
    for _ in range(50):
        theirs.grad = curvature * (theirs.detach() - target)
        ours.grad = (curvature * (ours.detach().cpu() - target)).to(DEVICE)
        reference.step()
        with backend.force(name):
            optimizer.step()
    apart = (ours.detach().cpu() - theirs.detach()).abs()
    # They travel by about 1; in 8 bits m is known to 0.4 % of the largest of its block, of those near their target to
    # less than half.
    assert theirs.detach().abs().max() > 0.8
    assert apart.max() < (1e-6 if bits == 32 else 0.15) and apart.mean() < (1e-6 if bits == 32 else 0.04)


@both
def test_surgery_on_the_way_is_surgery_beforehand(name: str) -> None:
    def cut(tensors: Sequence[Tensor]) -> Any:
        return flat_segments([0, 100, 256, 300, 700, 2900])

    make = inputs_of([(3000,)], retain=torch.int8, segments=cut)
    inputs = make(torch.Generator().manual_seed(5), torch.float32, DEVICE)
    apart = copied(inputs)
    with backend.force(name):
        adamw8bit_step(**inputs)
        surgery_apply(apart["grads"], apart.pop("retain"), apart.pop("segments"), apart.pop("plan"))
        adamw8bit_step(**apart)
    torch.testing.assert_close(inputs["params"][0], apart["params"][0], rtol=1e-6, atol=1e-6)
    assert (inputs["state1"][0].int() - apart["state1"][0].int()).abs().max() <= 1


@both
@pytest.mark.parametrize("bits", (8, 32))
def test_a_skipped_step_changes_no_bit(name: str, bits: int) -> None:
    make = inputs_of([(700,), (20, 30)], bits=bits, retain=torch.bfloat16, found_inf=1.0, master=True)
    inputs = make(torch.Generator().manual_seed(6), torch.bfloat16, DEVICE)
    inputs["grads"][0][5] = math.nan
    before = copied(inputs)
    with backend.force(name):
        adamw8bit_step(**inputs)
    for key in ("params", "copies", "state1", "state2", "absmax1", "absmax2"):
        assert all(torch.equal(a, b) for a, b in zip(inputs.get(key, []), before.get(key, []))), key


@both
def test_what_lies_behind_the_end_does_not_count_for_absmax(name: str) -> None:
    """The code 0 stands for -0.99 absmax: lanes of a partial block must not hold it."""
    n = 300
    p, g = [torch.zeros(n, device=DEVICE)], [torch.full((n,), 1e-4, device=DEVICE)]
    codes = [[torch.full((n,), code, dtype=torch.uint8, device=DEVICE)] for code in (127, 0)]
    absmax = [[torch.full((2,), 5.0, device=DEVICE)] for _ in range(2)]
    with backend.force(name):
        adamw8bit_step(p, g, *codes, *absmax, step=1, lr=1e-3)
    torch.testing.assert_close(absmax[0][0].cpu(), torch.full((2,), 1e-5))
    torch.testing.assert_close(absmax[1][0].cpu(), torch.full((2,), 1e-11))


@both
def test_where_a_gradient_is_not_finite_the_block_says_so(name: str) -> None:
    inputs = inputs_of([(1000,)])(torch.Generator().manual_seed(7), torch.float32, DEVICE)
    inputs["grads"][0][3] = math.inf
    inputs["grads"][0][600] = math.nan
    with backend.force(name):
        adamw8bit_step(**inputs)
    for number in ("1", "2"):
        assert inputs["absmax" + number][0].isnan().tolist() == [True, False, True, False]
    assert inputs["params"][0].isfinite().sum() == 998


@both
def test_two_runs_are_bitwise_equal(name: str) -> None:
    runs = []
    for _ in range(2):
        make = inputs_of([(5000,), (33, 31)], retain=torch.int8, seed=3)
        inputs = make(torch.Generator().manual_seed(8), torch.bfloat16, DEVICE)
        with backend.force(name):
            adamw8bit_step(**inputs)
        runs.append([t for key in ("params", "state1", "state2", "absmax1", "absmax2") for t in inputs[key]])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_lists_of_thousands_are_one_launch() -> None:
    make = inputs_of([(1 + i % 5,) for i in range(1500)], retain=torch.bfloat16, segments=whole)
    inputs = make(torch.Generator().manual_seed(9), torch.float32, DEVICE)
    assert len(block_chunks_of_pieces(tuple(t.numel() for t in inputs["params"]), (), DEVICE)[0]) == 1500
    with backend.force("reference"):
        adamw8bit_step(**inputs)
    assert all(p.isfinite().all() for p in inputs["params"])


def test_chunks_cover_every_element_once_and_know_their_pieces() -> None:
    draw = torch.Generator().manual_seed(10)
    for _ in range(30):
        numels = tuple(torch.randint(0, 40000, (3,), generator=draw).tolist())
        flat, owner = [], [torch.full((n,), -1) for n in numels]
        for i, n in enumerate(numels):
            cuts = sorted(torch.randint(0, n + 1, (6,), generator=draw).tolist())
            for segment, (begin, end) in enumerate(itertools.pairwise(cuts)):
                flat += [i, begin, end, segment]
                owner[i][begin:end] = segment
        chunks, pieces = block_chunks_of_pieces(numels, tuple(flat), torch.device("cpu"))
        seen = [torch.zeros(n) for n in numels]
        for tensor, begin, end, _, first, kind in chunks.tolist():
            assert begin % 256 == 0 and (end % 256 == 0 or end == numels[tensor]) and end - begin <= 16384
            seen[tensor][begin:end] += 1
            mine = torch.full((end - begin,), -1)
            if kind == 1:
                mine[:] = pieces[first, 2]
            for lower, upper, segment in pieces[first : first + kind - 1].tolist() if kind > 1 else ():
                mine[max(lower - begin, 0) : max(upper - begin, 0)] = segment
            assert torch.equal(mine, owner[tensor][begin:end])
        assert all((count == 1).all() for count in seen)


def test_what_does_not_go_together_is_refused() -> None:
    make = inputs_of([(300,), (7,)], retain=torch.int8)
    good = make(torch.Generator().manual_seed(1), torch.float32, DEVICE)
    bad: dict[str, Any] = {
        "grads": good["grads"][:1],
        "state1": [t.float() for t in good["state1"]],
        "absmax2": good["absmax2"][::-1],
        "plan": None,
        "segments": whole(good["params"]),
        "step": 0,
        "stochastic_rounding": True,
        "retain": good["retain"].codes,
        "params": [good["params"][0], good["params"][1].bfloat16()],
    }
    for key, value in bad.items():
        with pytest.raises(ValueError):
            adamw8bit_step(**(good | {key: value}))
    with pytest.raises(ValueError, match="float"):
        blockwise_quantize([torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match="absmax"):
        blockwise_dequantize(Quantized([torch.zeros(300, dtype=torch.int8)], [torch.zeros(1)]))


# --- the optimizer ----------------------------------------------------------------------------------------------------


def model(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(12)
    shapes = ((70, 80), (5,), (4096,), (4095,))
    return [nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for s in shapes]


def give_gradients(*lists: list[nn.Parameter], seed: int = 0) -> None:
    for parameters in lists:
        draw = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = (torch.randn(p.shape, generator=draw) * torch.rand(p.shape, generator=draw) ** 4).to(p.dtype)


def assert_near(ours: list[nn.Parameter], theirs: list[nn.Parameter], before: list[Tensor], lr: float) -> None:
    """Updates agree to a part of the learning rate: what a step of the number format in m makes of it, and seldom more
    (where v is small, a step of it is a large part of it)."""
    for a, b, p in zip(ours, theirs, before):
        assert not torch.equal(a, p)
        apart = (a - b).detach().abs()
        assert apart.mean() < 2e-3 * lr and apart.max() < 0.3 * lr


@pytest.mark.parametrize("direction", ("ours to theirs", "theirs to ours"))
@pytest.mark.parametrize("form", ("wrapped", "flat"))
def test_state_dicts_are_exchanged_with_bitsandbytes(direction: str, form: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    first, second, lr = model(), model(), 1e-3
    ours, theirs = AdamW8bit(first, lr=lr), bnb.optim.AdamW8bit(second, lr=lr)
    for step in range(3):
        give_gradients(first, second, seed=step)
        ours.step()
        theirs.step()
    source, target = (ours, theirs) if direction == "ours to theirs" else (theirs, ours)
    state = copy.deepcopy(source.state_dict())
    assert WRAPPED in state["state"][0]
    if form == "flat":
        state["state"] = {k: {**v.pop(WRAPPED), **v} for k, v in state["state"].items()}
    from_, to = (first, second) if direction == "ours to theirs" else (second, first)
    with torch.no_grad():
        for p, q in zip(from_, to):
            q.copy_(p)
    target.load_state_dict(state)
    for p, q in zip(from_, to):
        assert source.state[p]["step"] == target.state[q]["step"] == 3
        for key in ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"):
            assert (key in source.state[p]) == (key in target.state[q])
            if key in source.state[p]:
                assert torch.equal(source.state[p][key], target.state[q][key]), key
                assert source.state[p][key].dtype == target.state[q][key].dtype
    assert first[0].numel() >= 4096 and ours.state[first[0]]["state1"].dtype == torch.uint8
    assert ours.state[first[3]]["state1"].dtype == torch.float32
    give_gradients(first, second, seed=9)
    before = [p.detach().clone() for p in first]
    ours.step()
    theirs.step()
    assert_near(first, second, before, lr)


def test_own_state_dict_goes_on_bit_for_bit() -> None:
    first, second = model(torch.bfloat16), model(torch.bfloat16)
    one, other = AdamW8bit(first, seed=5), AdamW8bit(second, seed=5, lr=7.0)
    for step in range(2):
        give_gradients(first, seed=step)
        one.step()
    with torch.no_grad():
        for p, q in zip(first, second):
            q.copy_(p)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.param_groups[0]["lr"] == 1e-3 and other.state[second[0]]["absmax1"].dtype == torch.float32
    give_gradients(first, second, seed=7)
    one.step()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(first, second))
    # Loaded tensors are copies.
    assert other.state[second[0]]["state1"].data_ptr() != one.state[first[0]]["state1"].data_ptr()


def test_states_of_another_format_are_refused() -> None:
    parameters = model()
    optimizer = AdamW8bit(parameters)
    give_gradients(parameters)
    optimizer.step()
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["state"][0][WRAPPED]["qmap1"] = torch.linspace(-1, 1, 256)
    with pytest.raises(ValueError, match="qmap1"):
        optimizer.load_state_dict(wrong)
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["state"][0][WRAPPED]["absmax1"] = torch.zeros(3)
    with pytest.raises(ValueError, match="absmax1"):
        optimizer.load_state_dict(wrong)
    with pytest.raises(ValueError, match="group"):
        AdamW8bit([{"params": parameters[:1]}, {"params": parameters[1:]}]).load_state_dict(optimizer.state_dict())


@both
def test_optimizer_steps_kinds_together_with_surgery_and_copies(name: str) -> None:
    """Two groups, 8-bit and fp32 state, a parameter without a gradient: the same as calls of the op by hand."""
    draw = torch.Generator().manual_seed(13)
    shapes = ((300,), (8,), (40, 10), (6,))
    parameters = [nn.Parameter(torch.randn(s, generator=draw).to(DEVICE)) for s in shapes]
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in parameters]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 5e-2, "weight_decay": 0.0}]
    optimizer = AdamW8bit(groups, lr=1e-2, min_8bit_size=100, copies=copies)
    for i in (0, 2, 3):
        parameters[i].grad = torch.randn(shapes[i], generator=draw).to(DEVICE)
    moving = [parameters[i] for i in (0, 2, 3)]
    retain = [torch.randn(p.shape, generator=draw).to(DEVICE) for p in moving]
    plan, before = plan_of([-0.3, 0.0, -0.7], 0.5), [p.detach().clone() for p in parameters]
    with backend.force(name):
        loss = optimizer.step(lambda: torch.tensor(3.0), retain=retain, plan=plan, segments=per_tensor(moving))
    assert loss == 3.0 and torch.equal(parameters[1], before[1]) and parameters[1] not in optimizer.state
    for place, (i, coef) in enumerate(((0, -0.3), (2, 0.0), (3, -0.7))):
        lr, decay = (1e-2, 1e-2) if i < 2 else (5e-2, 0.0)
        g = (parameters[i].grad - coef * retain[place]) * 0.5  # type: ignore[operator]
        wanted = before[i] * (1 - lr * decay) - lr * g.sign()
        torch.testing.assert_close(parameters[i].detach(), wanted, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(copies[i], parameters[i].detach().bfloat16(), rtol=2**-7, atol=0)
        assert optimizer.state[parameters[i]]["state1"].dtype == (torch.float32 if i == 3 else torch.uint8)


def test_group_may_ask_for_32_bits_and_options_are_checked() -> None:
    parameter = nn.Parameter(torch.zeros(5000))
    parameter.grad = torch.ones(5000)
    optimizer = AdamW8bit([{"params": [parameter], "bits": 32}])
    optimizer.step()
    assert optimizer.state[parameter]["state1"].dtype == torch.float32
    with pytest.raises(ValueError, match="lr"):
        AdamW8bit([parameter], lr=-1.0)
    with pytest.raises(ValueError, match="copies"):
        AdamW8bit([parameter], copies=[])


# --- registration -----------------------------------------------------------------------------------------------------


def op_arguments(retain: torch.dtype | None) -> tuple[Any, ...]:
    """What adamw8bit_step hands to the registered op."""
    caught: list[tuple[Any, ...]] = []
    inputs = inputs_of([(300,), (20,)], retain=retain)(torch.Generator().manual_seed(1), torch.float32, DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "adamw8bit_step_op", lambda *given: caught.append(given))
        adamw8bit_step(**inputs)
    return caught[0]


@both
def test_ops_are_registered_as_torch_wants(name: str) -> None:
    tensors = [torch.randn(300, device=DEVICE), torch.randn(4, 5, device=DEVICE)]
    with backend.force(name):
        kept = blockwise_quantize(tensors)
        torch.library.opcheck(blockwise_quantize_op, (tensors, True, 3))
        torch.library.opcheck(blockwise_dequantize_op, (kept.codes, kept.absmax, torch.bfloat16))
        for retain in (None, torch.int8):
            torch.library.opcheck(adamw8bit_step_op, op_arguments(retain))


@both
def test_ops_compile_without_a_graph_break(name: str) -> None:
    def update(params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor]) -> list[Tensor]:
        kept = blockwise_quantize([g * 2 for g in grads])
        adamw8bit_step(params, blockwise_dequantize(kept), m, v, step=2, lr=0.1)
        return [p + 1 for p in params]

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    draw = torch.Generator().manual_seed(3)
    lists = [[torch.rand(s, generator=draw).to(DEVICE) for s in (300, 20)] for _ in range(4)]
    other = copied({"lists": lists})["lists"]
    with backend.force(name):
        results = update(*lists), compiled(*other)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert all(torch.equal(a, b) for one, two in zip(lists, other) for a, b in zip(one, two))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_benchmark_inputs_run(dtype: torch.dtype) -> None:
    inputs = bench_step(1 << 13, dtype, DEVICE)
    bytes_each = SPEC.bytes_moved(inputs) / (1 << 13)
    assert bytes_each == pytest.approx((17 if dtype == torch.float32 else 11) + (4 * 4 + 4) / 256)
    assert all(t.isfinite().all() for key, t in SPEC.run(inputs).items() if key.startswith("params"))
