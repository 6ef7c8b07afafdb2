"""The specs of `blockwise_quantize` and `blockwise_dequantize`, and how int8 codes are judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastunlearn_kernels.common.tiles import QUANT_BLOCK, TYPES
from fastunlearn_kernels.quantize.blockwise_quantize import (
    ROWS,
    Quantized,
    blockwise_dequantize,
    blockwise_dequantize_chunk_kernel,
    blockwise_quantize,
    blockwise_quantize_chunk_kernel,
)
from fastunlearn_kernels.testing.common.spec import SHORT, AotKernel, Case, Inputs, OpSpec, Outputs, nbytes, normal


def tensor_list(
    draw: torch.Generator,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
    layout: str = "plain",
    scale: float = 1.0,
) -> list[Tensor]:
    """Random tensors whose elements spread over some six decades, as those of gradients do."""
    tensors = [normal(draw, shape, torch.float32, device, "plain", scale) for shape in shapes]
    spread = [t * torch.exp(-3 * torch.rand(t.shape, generator=draw)).to(device) ** 2 for t in tensors]
    return [normal(draw, t.shape, dtype, device, layout).copy_(t) for t in spread]


def _bench_quantize(numel: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """16 tensors that hold about `numel` elements together."""
    size = max(numel // 16 // QUANT_BLOCK * QUANT_BLOCK, QUANT_BLOCK)
    return {"tensors": [torch.randn(size, dtype=torch.float32, device=device).to(dtype) for _ in range(16)]}


def _tensors(shapes: Sequence[Sequence[int]], layout: str = "plain", scale: float = 1.0, **options):
    def make(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        return {"tensors": tensor_list(draw, shapes, dtype, device, layout, scale)} | options

    return make


def _special(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Blocks of zeros, with NaN, with Inf, with denormal numbers only, with one element that counts."""
    x = tensor_list(draw, [(6 * QUANT_BLOCK,)], dtype, device)[0]
    x[:QUANT_BLOCK] = 0
    x[QUANT_BLOCK + 7] = float("nan")
    x[2 * QUANT_BLOCK + 100] = -float("inf")
    # Triton's interpreter reads denormal bf16 numbers wrongly.
    x[3 * QUANT_BLOCK : 4 * QUANT_BLOCK] *= 1e-33 if dtype == torch.bfloat16 else torch.finfo(dtype).tiny / 64
    x[4 * QUANT_BLOCK : 5 * QUANT_BLOCK] = 0
    x[4 * QUANT_BLOCK + 3] = -2.0
    return {"tensors": [x]}


MANY = [(7,), (0,), (256,), (16, 16), (1,), (3, 0), (513,), (2, 300)]


def _quantize_cases() -> tuple[Case, ...]:
    return (
        Case("0 elements", _tensors([(0,), (0, 3)])),
        Case("1 element", _tensors([(1,)])),
        Case("63 elements", _tensors([(63,)])),
        Case("1000 elements", _tensors([(1000,)])),
        Case("list with empty ones", _tensors(MANY)),
        Case("several chunks", _tensors([(16384 + 4096,), (40,)])),
        Case("unaligned", _tensors([(33, 31), (512,)], "unaligned")),
        Case("transposed", _tensors([(24, 40), (16, 32)], "transposed")),
        Case("strided", _tensors([(12, 50)], "strided")),
        Case("stochastic", _tensors([(600,), (16, 64)], stochastic=True, seed=1)),
        Case("stochastic, large seed", _tensors([(600,)], stochastic=True, seed=2**40 + 3)),
        Case("special blocks", _special),
        Case("huge", _tensors([(700,)], scale=1e37), (torch.float32, torch.bfloat16)),
        Case("tiny", _tensors([(700,)], scale=1e-36), (torch.float32,)),
    )


def _eager_quantize(inputs: Inputs) -> Outputs:
    """Nearest codes, tensor by tensor, in fp32."""
    out = {}
    for i, x in enumerate(inputs["tensors"]):
        blocks = torch.nn.functional.pad(x.reshape(-1).float(), (0, -x.numel() % QUANT_BLOCK)).view(-1, QUANT_BLOCK)
        absmax = blocks.abs().amax(1) if len(blocks) else blocks.new_zeros(0)
        codes = (blocks * (127 / absmax.clamp(min=1e-38))[:, None]).round().nan_to_num(0).to(torch.int8)
        out[f"codes[{i}]"] = codes.reshape(-1)[: x.numel()].reshape(x.shape)
        out[f"absmax[{i}]"] = absmax
    return out


def _check_codes(ours: Outputs, oracle: Outputs, eager: Outputs, inputs: Inputs) -> None:
    """Scales are exact; codes lie within half a step of the number (a whole one if stochastic), and agree with the
    oracle's except where fp32 cannot tell which of two codes it is."""
    stochastic = inputs.get("stochastic", False)
    for i, x in enumerate(inputs["tensors"]):
        absmax, codes = ours[f"absmax[{i}]"], ours[f"codes[{i}]"]
        torch.testing.assert_close(absmax, oracle[f"absmax[{i}]"], rtol=0, atol=0, equal_nan=True)
        scale = absmax.double().repeat_interleave(QUANT_BLOCK)[: x.numel()].reshape(x.shape)
        known = scale.isfinite() & (scale > 0)
        assert not codes[~known].any(), "a block of zeros or with NaN has codes other than 0"
        y = 127 * x.double()[known] / scale[known]
        distance = (codes[known] - y).abs()
        assert (distance <= (1.0 if stochastic else 0.5) + 1e-4).all(), f"code off by {distance.max():.3g} steps"
        differing = (codes != oracle[f"codes[{i}]"]).sum().item()
        assert differing <= 1 + x.numel() // 1000, f"{differing} of {x.numel()} codes differ from the oracle's"


def _codes(shapes: Sequence[Sequence[int]], layout: str = "plain", scale: float = 1.0):
    def make(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        codes = [torch.randint(-127, 128, shape, generator=draw).to(torch.int8).to(device) for shape in shapes]
        codes = [normal(draw, t.shape, torch.float32, device, layout).to(torch.int8).copy_(t) for t in codes]
        if layout == "unaligned":
            codes = [torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape) for t in codes]
        absmax = [scale * torch.rand(-(-t.numel() // QUANT_BLOCK), generator=draw).to(device) for t in codes]
        return {"codes": codes, "absmax": absmax, "like": torch.empty(0, dtype=dtype, device=device)}

    return make


def _not_finite(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
    inputs = _codes([(3 * QUANT_BLOCK,)])(draw, dtype, device)
    inputs["absmax"][0][1] = float("nan")
    inputs["codes"][0][QUANT_BLOCK : 2 * QUANT_BLOCK] = 0
    return inputs


def _dequantize_cases() -> tuple[Case, ...]:
    return (
        Case("0 elements", _codes([(0,)])),
        Case("1 element", _codes([(1,)])),
        Case("63 elements", _codes([(63,)])),
        Case("1000 elements", _codes([(1000,)])),
        Case("list with empty ones", _codes(MANY)),
        Case("several chunks", _codes([(16384 + 4096,), (40,)])),
        Case("unaligned", _codes([(33, 31), (512,)], "unaligned")),
        Case("transposed", _codes([(24, 40)], "transposed")),
        Case("strided", _codes([(12, 50)], "strided")),
        Case("block with NaN", _not_finite),
        Case("large scales", _codes([(700,)], scale=3e38), (torch.float32, torch.bfloat16)),
    )


def _run_quantize(inputs: Inputs) -> Outputs:
    codes, absmax = blockwise_quantize(**inputs)
    return {f"{name}[{i}]": t for name, ts in (("codes", codes), ("absmax", absmax)) for i, t in enumerate(ts)}


def _run_dequantize(inputs: Inputs) -> Outputs:
    tensors = blockwise_dequantize(Quantized(inputs["codes"], inputs["absmax"]), inputs["like"].dtype)
    return {f"out[{i}]": t for i, t in enumerate(tensors)}


def _eager_dequantize(inputs: Inputs) -> Outputs:
    dtype, out = inputs["like"].dtype, {}
    for i, (codes, absmax) in enumerate(zip(inputs["codes"], inputs["absmax"])):
        spread = absmax.repeat_interleave(QUANT_BLOCK)[: codes.numel()].reshape(codes.shape)
        out[f"out[{i}]"] = (codes / 127 * spread).to(dtype)
    return out


def _blocks(tensors: Sequence[Tensor]) -> int:
    return sum(-(-t.numel() // QUANT_BLOCK) for t in tensors)


def _bench_dequantize(numel: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    codes, absmax = blockwise_quantize(_bench_quantize(numel, dtype, device)["tensors"])
    return {"codes": codes, "absmax": absmax, "like": torch.empty(0, dtype=dtype, device=device)}


def _aot(name: str, fn: Any, pointers: dict[str, str], numbers: dict[str, str], **constants: Any) -> AotKernel:
    constants |= {"ROWS": ROWS, "WIDTH": QUANT_BLOCK}
    signature = {"chunks_ptr": "*i64", "addresses_ptr": "*i64"} | pointers | numbers
    signature |= {constant: "constexpr" for constant in constants}
    aligned = ("chunks_ptr", "addresses_ptr", *pointers)
    return AotKernel(name, fn, signature, constants, aligned, max_registers=64, elements=ROWS * QUANT_BLOCK)


def _quantizer(dtype: torch.dtype, stochastic: bool) -> AotKernel:
    name = SHORT[dtype] + (" stochastic" if stochastic else "")
    pointers = {"codes_ptr": "*i8", "absmax_ptr": "*fp32"}
    constants = {"X": TYPES[dtype], "STOCHASTIC": stochastic}
    return _aot(name, blockwise_quantize_chunk_kernel, pointers, {"seed": "i64"}, **constants)


QUANTIZE_SPEC = OpSpec(
    name="blockwise_quantize",
    run=_run_quantize,
    eager=_eager_quantize,
    cases=_quantize_cases(),
    compare=_check_codes,
    bytes_moved=lambda inputs: (
        nbytes(inputs["tensors"]) + sum(t.numel() for t in inputs["tensors"]) + 4 * _blocks(inputs["tensors"])
    ),
    launches=1,
    kernels=(*[_quantizer(dtype, False) for dtype in SHORT], _quantizer(torch.bfloat16, True)),
    bench=_bench_quantize,
)

DEQUANTIZE_SPEC = OpSpec(
    name="blockwise_dequantize",
    run=_run_dequantize,
    eager=_eager_dequantize,
    cases=_dequantize_cases(),
    bytes_moved=lambda inputs: (
        nbytes(inputs["codes"], inputs["absmax"])
        + sum(t.numel() for t in inputs["codes"]) * inputs["like"].element_size()
    ),
    launches=1,
    kernels=tuple(
        _aot(short, blockwise_dequantize_chunk_kernel, {"out_ptr": f"*{short}"}, {"tensors": "i32"})
        for short in SHORT.values()
    ),
    bench=_bench_dequantize,
)
