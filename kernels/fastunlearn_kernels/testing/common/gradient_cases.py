"""Inputs for the specs of the surgery ops: gradients in every layout and format, and segments that cut them oddly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastunlearn_kernels.common.tiles import QUANT_BLOCK
from fastunlearn_kernels.gradients.operands import block_scales
from fastunlearn_kernels.gradients.segments import Segments, grouped, per_tensor, whole
from fastunlearn_kernels.quantize.blockwise_quantize import Quantized
from fastunlearn_kernels.testing.common.spec import Case, Inputs, normal

Make = Callable[[torch.Generator, torch.dtype, torch.device], Inputs]

# A flat partition of two chunks: segments of every size, empty ones, cuts at odd places, padding at the end.
FLAT = [(20000,)]
BOUNDARIES = (0, 1, 17, 17, 256, 1000, 16384, 16385, 18000, 19001)
# Small tensors, empty ones among them. Interpreted, each costs as much as thousands of elements.
SMALL = tuple((3 * i % 41, 1 + i % 7) if i % 5 else (0, 4) for i in range(16))


def quantized(tensors: Sequence[Tensor]) -> Quantized:
    """To int8 with an absmax per 256 elements: code = round(127 x / absmax)."""
    codes, absmax = [], []
    for tensor in tensors:
        flat = tensor.detach().float().reshape(-1)
        blocks = -(-flat.numel() // QUANT_BLOCK)
        padded = torch.nn.functional.pad(flat, (0, blocks * QUANT_BLOCK - flat.numel())).view(blocks, QUANT_BLOCK)
        scales = padded.abs().amax(1) if blocks else padded.new_zeros(0)
        rounded = (padded * (127 / scales.clamp(min=1e-30))[:, None]).round().to(torch.int8)
        codes.append(rounded.view(-1)[: flat.numel()].view(tensor.shape))
        absmax.append(scales)
    return Quantized(codes, absmax)


def flat_segments(boundaries: Sequence[int]) -> Segments:
    """One flat buffer cut at ascending `boundaries`: each part is a segment; what lies outside belongs to none."""
    pieces = tuple((0, begin, end, i) for i, (begin, end) in enumerate(itertools.pairwise(boundaries)))
    return Segments(pieces, len(pieces))


def cut_at(boundaries: Sequence[int]) -> Callable[[Sequence[Tensor]], Segments]:
    """Segments of a list of one flat tensor."""
    return lambda tensors: flat_segments(boundaries)


def in_groups(tensors: Sequence[Tensor]) -> Segments:
    """Three segments, whose tensors do not follow one another, and a fourth without any."""
    return grouped(tensors, [i % 3 for i in range(len(tensors))], count=4)


def in_two(tensors: Sequence[Tensor]) -> Segments:
    """One tensor, cut in the middle of a row."""
    return Segments(((0, 0, 499, 0), (0, 499, tensors[0].numel(), 1)), 2)


def gradients(
    shapes: Sequence[Sequence[int]],
    segments: Callable[[Sequence[Tensor]], Segments] = per_tensor,
    layout: str = "plain",
    retain: torch.dtype | str | None = "same",
    correlation: float | None = None,
    scale: float = 1.0,
    change: Callable[[Inputs], None] | None = None,
) -> Make:
    """A factory of unlearn, retain and segments.

    retain: a dtype, "same" as unlearn's, torch.int8 for the quantised form, None for an absent one. correlation:
    between the two gradients, from -1 (everything conflicts) to 1 (nothing does); None mixes both. change: a last edit
    in place.
    """

    def make(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        unlearn = [normal(draw, shape, dtype, device, layout, scale) for shape in shapes]
        kept = torch.float32 if retain is torch.int8 else retain if isinstance(retain, torch.dtype) else dtype
        other = [normal(draw, shape, kept, device, layout, scale) for shape in shapes]
        for i, (u, r) in enumerate(zip(unlearn, other)):
            wanted = (-0.5, 0.4, -0.05)[i % 3] if correlation is None else correlation
            r.mul_((1 - wanted**2) ** 0.5).add_((u.float() * wanted).to(kept))
        inputs: Inputs = {"unlearn": unlearn, "retain": other, "segments": segments(unlearn)}
        if change is not None:
            change(inputs)
        if retain is None:
            inputs["retain"] = None
        elif retain is torch.int8:
            inputs["retain"] = quantized(inputs["retain"])
        return inputs

    return make


def zero_retain(inputs: Inputs) -> None:
    for r in inputs["retain"]:
        r.zero_()


def nan_in_one(inputs: Inputs) -> None:
    inputs["retain"][1].reshape(-1)[3] = float("nan")


def flat_partition(numel: int, dtype: torch.dtype, device: torch.device, parts: int = 16) -> Inputs:
    """For benchmarks: one flat buffer in `parts` segments, r in 8 bits for bf16, else as u. Made on the device."""
    draw = torch.Generator(device).manual_seed(0)

    def buffer() -> Tensor:
        out = torch.empty(numel, dtype=dtype, device=device)
        return out.normal_(generator=draw)

    unlearn, boundaries = [buffer()], [numel * i // parts // 16 * 16 for i in range(parts)] + [numel]
    if dtype is not torch.bfloat16:
        return {"unlearn": unlearn, "retain": [buffer()], "segments": flat_segments(boundaries)}
    codes = torch.randint(-127, 128, (numel,), dtype=torch.int8, device=device, generator=draw)
    absmax = 1 + torch.rand(-(-numel // QUANT_BLOCK), device=device, generator=draw)
    return {"unlearn": unlearn, "retain": Quantized([codes], [absmax]), "segments": flat_segments(boundaries)}


def eager_pieces(inputs: Inputs) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """(u, r, segment) of each piece, in the dtype of u: what a user of plain PyTorch starts from, r dequantised.

    u are views; where that is impossible, since the tensor has gaps, copies that are written back after the last piece.
    """
    unlearn, retain = inputs["unlearn"], inputs["retain"]
    flat = [u.reshape(-1) for u in unlearn]
    for tensor, begin, end, segment in inputs["segments"].pieces:
        r = None
        if isinstance(retain, Quantized) and begin < end:
            scales = block_scales(retain.absmax[tensor], begin, end)
            r = (retain.codes[tensor].reshape(-1)[begin:end] * scales / 127).to(unlearn[tensor].dtype)
        elif retain is not None and not isinstance(retain, Quantized):
            r = retain[tensor].reshape(-1)[begin:end].to(unlearn[tensor].dtype)
        yield flat[tensor][begin:end], r, segment
    for u, copy in zip(unlearn, flat):
        if u.data_ptr() != copy.data_ptr():
            u.copy_(copy.view(u.shape))


def piece_bytes(tensors: Sequence[Tensor], absmax: Sequence[Tensor], pieces: Sequence[int]) -> int:
    """Bytes that hold the pieces' elements and their scales: padding between pieces is never touched."""
    total = 0
    for tensor, begin, end, _ in zip(*[iter(pieces)] * 4):
        if tensors and begin < end:
            total += (end - begin) * tensors[tensor].element_size()
        if absmax and begin < end:
            total += ((end - 1) // QUANT_BLOCK - begin // QUANT_BLOCK + 1) * absmax[tensor].element_size()
    return total


# What takes the interpreter long, and does not depend on the dtype of u, is run in one.
_ONE = (torch.bfloat16,)

GRADIENT_CASES = (
    Case("no tensors", gradients([])),
    Case("0 elements", gradients([(0,)])),
    Case("1 element", gradients([(1,)])),
    Case("63 elements", gradients([(63,)], correlation=-0.5)),
    Case("1000 elements", gradients([(1000,)], correlation=-0.5)),
    Case("small tensors", gradients(SMALL)),
    Case("in groups", gradients(SMALL, in_groups), _ONE),
    Case("all in one", gradients(SMALL, whole), _ONE),
    Case("several chunks", gradients(FLAT, correlation=-0.1)),
    Case("flat, cut at odd places", gradients(FLAT, cut_at(BOUNDARIES), correlation=-0.05)),
    Case("flat, cut, 8-bit retain", gradients(FLAT, cut_at(BOUNDARIES), retain=torch.int8, correlation=-0.05)),
    Case("8-bit retain", gradients([(3000,), (0,), (64, 5)], retain=torch.int8)),
    Case("8-bit retain, transposed", gradients([(40, 30), (7, 9)], layout="transposed", retain=torch.int8)),
    Case("bf16 retain", gradients([(3000,), (64, 5)], retain=torch.bfloat16)),
    Case("fp32 retain", gradients([(3000,), (64, 5)], retain=torch.float32)),
    Case("no retain", gradients([(3000,), (64, 5)], retain=None)),
    Case("unaligned", gradients([(3000,), (64, 5)], layout="unaligned")),
    Case("transposed", gradients([(40, 30), (7, 9)], layout="transposed")),
    Case("transposed and cut", gradients([(40, 30)], in_two, layout="transposed")),
    Case("strided", gradients([(40, 30), (7, 9)], layout="strided")),
    Case("nothing conflicts", gradients([(3000,), (64, 5)], correlation=0.6)),
    Case("everything conflicts", gradients([(3000,), (64, 5)], correlation=-0.9)),
    Case("r = 0", gradients([(3000,), (64, 5)], change=zero_retain)),
    Case("NaN in one tensor", gradients([(300,), (64, 5), (7,)], change=nan_in_one)),
)
# fp16 ends at 65504.
HUGE = gradients([(3000,), (64, 5)], scale=1e15)


def gradient_case(name: str) -> Make:
    return next(case.make for case in GRADIENT_CASES if case.name == name)
