"""Floating-point operations of the U-Net, counted without computing them, and the rate that the device reaches.

torch's own counter over one forward and one backward pass on the meta device, so that neither the weights nor the
attention backend matter; and the rate of one large matrix product, measured in the same process as the rest. The
backward pass is counted, not taken for twice the forward: where only cross-attention is trained it is about 1.1 times.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastunlearn.models.parameter_names import set_trainable, trainable_names
from fastunlearn.planning.activations import Shape, build_unet, example_inputs

MATMUL = {"cuda": 8192, "cpu": 1024}
REPEATS = {"cuda": 20, "cpu": 3}


@dataclass(frozen=True)
class Flops:
    """Of one sample."""

    forward: int
    backward: int


@lru_cache(maxsize=32)
def unet_flops(unet_json: str, scope: str, side: int, tokens: int) -> Flops:
    """One sample through the U-Net of this configuration, with the tensors of ``scope`` trained."""
    config = json.loads(unet_json)
    unet = build_unet(config).train()
    set_trainable(unet, trainable_names(unet, scope))
    inputs = example_inputs(config, 1, Shape(side, tokens), "meta")
    with FlopCounterMode(display=False) as forward:
        out = unet(**inputs, return_dict=False)[0]
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return Flops(forward.get_total_flops(), backward.get_total_flops())


def peak_rate(device: torch.device) -> tuple[float, str]:
    """(FLOP/s, what was multiplied): the best of several square products, in bf16 on a GPU and fp32 on a CPU."""
    size, dtype = MATMUL[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS[device.type] + 1):  # the first one warms up
        best = min(best, _seconds_of_product(a, b))
    return 2 * size**3 / best, f"{size} x {size} {str(dtype).removeprefix('torch.')}"


def _seconds_of_product(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - started


def utilisation(flops: float, seconds: float, peak: float) -> float | None:
    """Share of the peak rate; None where nothing was timed."""
    return flops / seconds / peak if seconds > 0 and peak > 0 else None
