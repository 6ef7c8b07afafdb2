"""What other libraries have for the same purpose, and the whole of surgery, clipping and optimizer in three forms.

Here and not in the specs, since the kernel package imports torch and Triton only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import quantize_blockwise
from torch import Tensor

from fastunlearn_kernels.adamw8bit.step import adamw8bit_step
from fastunlearn_kernels.gradients.segments import per_tensor
from fastunlearn_kernels.gradients.surgery_coefficients import surgery_coefficients
from fastunlearn_kernels.gradients.surgery_dots import surgery_dots
from fastunlearn_kernels.quantize.blockwise_quantize import Quantized, blockwise_quantize
from fastunlearn_kernels.testing.common.spec import Inputs

Call = Callable[[], Any]
TENSORS = 16
MAX_NORM, LEARNING_RATE = 1.0, 1e-5


def _bitsandbytes_step(inputs: Inputs) -> Call:
    """The optimizer alone: neither surgery nor clipping, and bf16 parameters rounded to nearest."""
    params = [torch.nn.Parameter(p) for p in inputs["params"]]
    for param, grad in zip(params, inputs["grads"]):
        param.grad = grad.to(param.dtype)
    return bitsandbytes.optim.AdamW8bit(params, lr=inputs["lr"]).step


def _bitsandbytes_quantize(inputs: Inputs) -> Call:
    """Its dynamic map, which spends its codes on small values."""
    return lambda: [quantize_blockwise(t, blocksize=256) for t in inputs["tensors"]]


# Op -> name -> inputs of the benchmark -> a call without arguments.
RIVALS: dict[str, dict[str, Callable[[Inputs], Call]]] = {
    "adamw8bit_step": {"bitsandbytes AdamW8bit, no surgery": _bitsandbytes_step},
    "blockwise_quantize": {"bitsandbytes quantize_blockwise": _bitsandbytes_quantize},
}


# --- surgery + clip + AdamW8bit ---------------------------------------------------------------------------------------


def update_inputs(numel: int, device: torch.device) -> Inputs:
    """bf16 parameters, unlearn and retain gradients in 16 tensors; nothing is kept for an optimizer yet."""
    size = numel // TENSORS
    lists = {name: [torch.empty(size, dtype=torch.bfloat16, device=device).normal_() for _ in range(TENSORS)]
             for name in ("params", "unlearn", "retain")}  # fmt: skip
    return lists


def update_bytes(numel: int, retain_bytes: float) -> int:
    """Dots read u and r; the step reads u, r, p, m, v and writes p, m, v, the moments with an absmax per 256 each."""
    return int(numel * (2 + retain_bytes + 2 + retain_bytes + 2 * 2 + 2 * 2 * (1 + 4 / 256)))


def project_and_clip(unlearn: list[Tensor], retain: list[Tensor]) -> list[Tensor]:
    """One-sided surgery per tensor, then clipping by the norm of everything, without waiting for the device."""
    projected = []
    for u, r in zip(unlearn, retain):
        inner, square = torch.dot(u, r), torch.dot(r, r)
        projected.append(u - torch.where(square > 0, inner.clamp(max=0) / square, 0.0) * r)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(projected)))
    scale = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(projected, scale)
    return projected


def _with_bitsandbytes(inputs: Inputs, before: Callable[..., list[Tensor]]) -> Call:
    params = [torch.nn.Parameter(p) for p in inputs["params"]]
    optimizer = bitsandbytes.optim.AdamW8bit(params, lr=LEARNING_RATE)

    def update() -> None:
        for param, grad in zip(params, before(inputs["unlearn"], inputs["retain"])):
            param.grad = grad
        optimizer.step()

    return update


def _ours(inputs: Inputs, retain: list[Tensor] | Quantized) -> Call:
    params, unlearn, segments = inputs["params"], inputs["unlearn"], per_tensor(inputs["params"])
    codes = [[torch.full_like(p, zero, dtype=torch.uint8) for p in params] for zero in (127, 0)]
    absmax = [[p.new_zeros(-(-p.numel() // 256), dtype=torch.float32) for p in params] for _ in range(2)]
    step = 0

    def update() -> None:
        nonlocal step
        step += 1
        plan = surgery_coefficients(surgery_dots(unlearn, retain, segments), max_norm=MAX_NORM)
        adamw8bit_step(
            params, unlearn, *codes, *absmax, step=step, lr=LEARNING_RATE, retain=retain, plan=plan, segments=segments,
            seed=step,
        )  # fmt: skip

    return update


# Name -> (inputs -> a call without arguments, bytes an element of the retain gradient).
UPDATES: dict[str, tuple[Callable[[Inputs], Call], float]] = {
    "ours": (lambda inputs: _ours(inputs, inputs["retain"]), 2),
    "ours, 8-bit retain": (lambda inputs: _ours(inputs, blockwise_quantize(inputs["retain"])), 1 + 4 / 256),
    "eager and bitsandbytes": (lambda inputs: _with_bitsandbytes(inputs, project_and_clip), 2),
    "compiled and bitsandbytes": (lambda inputs: _with_bitsandbytes(inputs, torch.compile(project_and_clip)), 2),
}
