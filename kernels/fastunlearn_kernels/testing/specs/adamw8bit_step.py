"""The spec of `adamw8bit_step`, and how its results are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.adamw8bit.kernel import adamw8bit_step_chunk_kernel
from fastunlearn_kernels.adamw8bit.step import ROWS, WRITTEN, adamw8bit_step
from fastunlearn_kernels.common import backend
from fastunlearn_kernels.common.tiles import QUANT_BLOCK
from fastunlearn_kernels.gradients.operands import unpacked
from fastunlearn_kernels.gradients.segments import Segments, per_tensor, whole
from fastunlearn_kernels.gradients.surgery_coefficients import SurgeryPlan
from fastunlearn_kernels.quantize.blockwise_quantize import Quantized, blockwise_quantize
from fastunlearn_kernels.quantize.dynamic_code import SMALLEST_ABSMAX, dynamic_map, quantize_dynamic
from fastunlearn_kernels.testing.common.gradient_cases import flat_segments
from fastunlearn_kernels.testing.common.spec import AotKernel, Case, Inputs, OpSpec, Outputs, nbytes, normal
from fastunlearn_kernels.testing.specs.blockwise_quantize import MANY, tensor_list

EPS_FP32 = torch.finfo(torch.float32).eps
_BF16 = (torch.bfloat16,)


def _moments(grads: Sequence[Tensor], draw: torch.Generator, bits: int, layout: str) -> Inputs:
    """m and v of gradients like these. No v is so small that it becomes 0: divided by it, rounding errors of a gradient
    that nearly cancels would be all that is left."""
    first = [g.float() * (0.6 * torch.rand(g.shape, generator=draw) - 0.3).to(g.device) for g in grads]
    second = [(g.float() * torch.rand(g.shape, generator=draw).to(g.device)) ** 2 for g in grads]
    second = [v + 1e-3 * g.float().square().mean() for v, g in zip(second, grads)]
    if bits == 32:
        keep = [[normal(draw, t.shape, torch.float32, t.device, layout).copy_(t) for t in ts] for ts in (first, second)]
        return {"state1": keep[0], "state2": keep[1]}
    coded = [[quantize_dynamic(t, signed) for t in ts] for ts, signed in ((first, True), (second, False))]
    out: Inputs = {}
    for number, pairs in enumerate(coded, 1):
        codes = [normal(draw, c.shape, torch.float32, c.device, layout).to(torch.uint8) for c, _ in pairs]
        if layout == "unaligned":
            codes = [torch.cat([c.new_zeros(1), c.reshape(-1)])[1:].view(c.shape) for c in codes]
        out[f"state{number}"] = [c.copy_(given) for c, (given, _) in zip(codes, pairs)]
        out[f"absmax{number}"] = [absmax for _, absmax in pairs]
    return out


def inputs_of(
    shapes: Sequence[Sequence[int]],
    layout: str = "plain",
    scale: float = 1e-2,
    bits: int = 8,
    retain: torch.dtype | None = None,
    plan: bool = False,
    segments: Callable[[Sequence[Tensor]], Segments] = per_tensor,
    found_inf: float = 0.0,
    master: bool = False,
    change: Callable[[Inputs], None] | None = None,
    **options: Any,
) -> Callable[[torch.Generator, torch.dtype, torch.device], Inputs]:
    """A factory of one step's arguments. `master`: fp32 parameters, gradients and copies in the dtype of the case;
    `change`: what else to do with the inputs. Half of the segments have coef 0."""

    def make(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        params = [normal(draw, s, torch.float32 if master else dtype, device, layout) for s in shapes]
        grads = tensor_list(draw, shapes, dtype, device, layout, scale)
        inputs: Inputs = {"params": params, "grads": grads, "step": 3, "lr": 1e-2}
        inputs |= _moments(grads, draw, bits, layout) | options
        if master:
            inputs["copies"] = [normal(draw, s, dtype, device, layout) for s in shapes]
        if retain is not None:
            kept = tensor_list(draw, shapes, torch.float32 if retain == torch.int8 else retain, device, layout, scale)
            inputs["retain"] = blockwise_quantize(kept) if retain == torch.int8 else kept
        if retain is not None or plan:
            cut = segments(params)
            coef = torch.randn(cut.count, generator=draw)
            coef[::2] = 0
            numbers = torch.tensor(0.37), torch.tensor(found_inf), torch.tensor(1.0)
            inputs |= {"segments": cut, "plan": SurgeryPlan(*[t.to(device) for t in (coef, *numbers)])}
        if change is not None:
            change(inputs)
        return inputs

    return make


def _not_finite(inputs: Inputs) -> None:
    inputs["grads"][0].view(-1)[3] = float("nan")
    inputs["grads"][0].view(-1)[QUANT_BLOCK + 3] = float("inf")
    inputs["params"][0].view(-1)[2 * QUANT_BLOCK + 3] = float("nan")


def _turned(inputs: Inputs) -> None:
    """Every gradient points against m and no v is the largest there can be: absmax shows what else it counted."""
    for g, codes1, codes2 in zip(inputs["grads"], inputs["state1"], inputs["state2"]):
        g.copy_(g.abs() * torch.where(codes1 > 127, -1.0, 1.0))
        codes2.clamp_(max=200)


def _from_zero(inputs: Inputs) -> None:
    """The first step: no moments yet; some gradients are zero throughout a block."""
    inputs["step"] = 1
    for name in ("state1", "state2", "absmax1", "absmax2"):
        for tensor in inputs[name]:
            tensor.zero_()
    inputs["grads"][0].view(-1)[:QUANT_BLOCK] = 0


def _cut(tensors: Sequence[Tensor]) -> Segments:
    """One flat buffer, cut anywhere: inside of blocks, several times in one, and with padding at the end."""
    return flat_segments([0, 100, 256, 300, 301, 700, 9000, 17000, 17408, 19000])


def _cases() -> tuple[Case, ...]:
    return (
        Case("0 elements", inputs_of([(0,), (0, 3)])),
        Case("1 element", inputs_of([(1,)])),
        Case("63 elements", inputs_of([(63,)])),
        Case("gradients against the moments", inputs_of([(63,), (300,)], change=_turned)),
        Case("1000 elements", inputs_of([(1000,)])),
        Case("list with empty ones", inputs_of(MANY)),
        Case("several chunks", inputs_of([(16384 + 2048,), (40,)])),
        Case("unaligned", inputs_of([(33, 31), (512,)], "unaligned")),
        Case("transposed", inputs_of([(24, 40), (16, 32)], "transposed")),
        Case("strided", inputs_of([(12, 50)], "strided")),
        Case("nearest", inputs_of([(1000,)], stochastic_rounding=False), _BF16),
        Case("large seed", inputs_of([(1000,)], seed=2**40 + 5), _BF16),
        Case("master and copies", inputs_of([(700,), (32, 16)], master=True), (torch.bfloat16, torch.float16)),
        Case("fp32 moments", inputs_of(MANY, bits=32)),
        Case("fp32 moments, strided", inputs_of([(12, 50)], "strided", bits=32), (torch.float32,)),
        Case("clip only", inputs_of([(700,), (40, 10)], plan=True, segments=whole)),
        Case("bf16 retain", inputs_of([(700,), (0,), (2048,)], retain=torch.bfloat16)),
        Case("int8 retain", inputs_of([(700,), (0,), (2048,)], retain=torch.int8)),
        Case("int8 retain, transposed", inputs_of([(24, 40)], "transposed", retain=torch.int8), _BF16),
        Case("flat, cut anywhere", inputs_of([(20000,)], retain=torch.int8, segments=_cut)),
        Case("flat, cut, fp32 moments", inputs_of([(20000,)], bits=32, retain=torch.bfloat16, segments=_cut), _BF16),
        Case("skipped", inputs_of([(700,), (32, 16)], retain=torch.bfloat16, found_inf=1.0, master=True)),
        Case("first step", inputs_of([(700,)], change=_from_zero)),
        Case("not finite", inputs_of([(1000,)], change=_not_finite)),
        Case("huge", inputs_of([(700,)], scale=1e17), (torch.float32, torch.bfloat16)),
        Case("tiny", inputs_of([(700,)], scale=1e-17), (torch.float32, torch.bfloat16)),
    )


def bench_step(numel: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """16 tensors of about `numel` elements with an int8 retain gradient, every segment in conflict; fp32 is a master
    whose gradients and copies are bf16. Made on the device."""
    size = max(numel // 16 // QUANT_BLOCK * QUANT_BLOCK, QUANT_BLOCK)
    low = torch.bfloat16 if dtype == torch.float32 else dtype

    def tensors(of: torch.dtype) -> list[Tensor]:
        return [torch.empty(size, dtype=of, device=device).normal_() for _ in range(16)]

    def codes(of: torch.dtype, low: int, high: int) -> list[Tensor]:
        return [torch.randint(low, high, (size,), dtype=of, device=device) for _ in range(16)]

    def scales() -> list[Tensor]:
        return [torch.rand(size // QUANT_BLOCK, device=device) + 1 for _ in range(16)]

    params = tensors(dtype)
    plan = SurgeryPlan(torch.full((16,), -0.1, device=device), *torch.tensor([0.5, 0.0, 1.0], device=device).unbind())
    inputs: Inputs = {"params": params, "grads": tensors(low), "step": 3, "lr": 1e-5, "plan": plan}
    inputs |= {"retain": Quantized(codes(torch.int8, -127, 128), scales()), "segments": per_tensor(params)}
    inputs |= {f"state{i}": codes(torch.uint8, 0, 256) for i in (1, 2)} | {f"absmax{i}": scales() for i in (1, 2)}
    return inputs | ({"copies": tensors(low)} if dtype == torch.float32 else {})


def _check_step(ours: Outputs, oracle: Outputs, eager: Outputs, inputs: Inputs) -> None:
    """Parameters within their dtype's rounding, absmax within that of fp32, codes at most one away and seldom that."""
    assert set(ours) == set(oracle), f"outputs of one only: {sorted(set(ours) ^ set(oracle))}"
    for name, mine in ours.items():
        if mine.numel() == 0:
            continue
        kind, place = name.rstrip("]").split("[")
        exact = oracle[name]
        if mine.dtype == torch.uint8:
            _check_codes(name, mine, exact, oracle[f"absmax{kind[-1]}[{place}]"], signed=kind == "state1")
            continue
        expected = exact.to(mine.dtype).double()
        finite = expected.isfinite()
        special = [t.double()[~finite].nan_to_num(7.0) for t in (mine, expected)]
        assert torch.equal(*special), f"{name}: NaN or Inf differ"
        error, size = (mine.double() - exact)[finite].abs(), exact[finite].abs()
        # The update is a small part of what it is added to; sums of two signs are judged by the larger summand.
        largest = size.max().item() if size.numel() else 0.0
        allowed = torch.finfo(mine.dtype).eps * size + 8 * EPS_FP32 * largest + SMALLEST_ABSMAX
        if mine.dtype == torch.float16:
            allowed += 2.0**-24
        assert (error <= allowed).all(), f"{name}: error {error.max():.3g}, largest {largest:.3g}"
        if mine.dtype == torch.bfloat16 and kind == "params" and inputs.get("stochastic_rounding", True):
            # Drawn from the same bits; fp32 may differ in the last place, which seldom decides.
            differing = int((mine[finite] != eager[name][finite]).sum())
            assert differing <= 1 + mine.numel() // 1000, f"{name}: {differing} elements rounded otherwise"


def _check_codes(name: str, mine: Tensor, exact: Tensor, absmax: Tensor, signed: bool) -> None:
    known = absmax.isfinite() & (absmax >= SMALLEST_ABSMAX)
    known = known.repeat_interleave(QUANT_BLOCK)[: mine.numel()].reshape(mine.shape)
    apart = (mine[known].int() - exact[known].int()).abs()
    assert not apart.numel() or apart.max() <= 1, f"{name}: {apart.max()} codes away"
    differing = int((apart > 0).sum())
    assert differing <= 1 + mine.numel() // 200, f"{name}: {differing} of {mine.numel()} codes differ"
    zero = absmax.eq(0).repeat_interleave(QUANT_BLOCK)[: mine.numel()].reshape(mine.shape)
    value = dynamic_map(signed, mine.device)[mine[zero].long()]
    assert not value.any(), f"{name}: a block of zeros has codes other than that of 0"


def _run(inputs: Inputs) -> Outputs:
    adamw8bit_step(**inputs)
    lists = {name: inputs.get(name, ()) for name in WRITTEN}
    return {f"{name}[{i}]": t for name, tensors in lists.items() for i, t in enumerate(tensors)}


def _eager(inputs: Inputs) -> Outputs:
    with backend.force("reference"):
        return _run(inputs)


def _bytes_moved(inputs: Inputs) -> int:
    codes, scales = unpacked(inputs.get("retain"))
    moments = [inputs.get(name, []) for name in ("state1", "state2", "absmax1", "absmax2")]
    once = nbytes(inputs["grads"], inputs.get("copies"), codes, scales)
    return once + 2 * nbytes(inputs["params"], *[list(m) for m in moments])


def _kernel(name: str, p: Any, u: Any, copy: Any = None, r: Any = None, s: Any = tl.uint8) -> AotKernel:
    """One kernel of those that `_launch` compiles; types are Triton's."""
    pointers = {name: "*i64" for name in ("chunks_ptr", "pieces_ptr", "addresses_ptr")}
    pointers |= {f"{name}_ptr": "*fp32" for name in ("map1", "map2", "coef", "scale", "found_inf")}
    numbers = ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "decay", "step_size", "inv_sqrt_bias2")
    constants = {
        "P": p, "C": copy, "U": u, "R": r, "S": s, "PLAN": r is not None, "STOCHASTIC": p is tl.bfloat16,
        "ROWS": ROWS, "WIDTH": QUANT_BLOCK,
    }  # fmt: skip
    signature = pointers | {"tensors": "i32"} | dict.fromkeys(numbers, "fp32") | {"seed": "i64"}
    signature |= dict.fromkeys(constants, "constexpr")
    return AotKernel(
        name, adamw8bit_step_chunk_kernel, signature, constants, tuple(pointers), max_registers=128,
        elements=ROWS * QUANT_BLOCK,
    )  # fmt: skip


SPEC = OpSpec(
    name="adamw8bit_step",
    run=_run,
    eager=_eager,
    cases=_cases(),
    compare=_check_step,
    bytes_moved=_bytes_moved,
    launches=1,
    kernels=(
        _kernel("bf16, stochastic", tl.bfloat16, tl.bfloat16),
        _kernel("bf16, stochastic, bf16 retain", tl.bfloat16, tl.bfloat16, r=tl.bfloat16),
        _kernel("bf16, stochastic, int8 retain", tl.bfloat16, tl.bfloat16, r=tl.int8),
        _kernel("fp32 and bf16 copy, int8 retain", tl.float32, tl.bfloat16, tl.bfloat16, tl.int8),
        _kernel("fp32, fp32 retain", tl.float32, tl.float32, r=tl.float32),
        _kernel("fp16", tl.float16, tl.float16),
        _kernel("fp32, fp32 moments", tl.float32, tl.float32, s=tl.float32),
    ),
    bench=bench_step,
)
