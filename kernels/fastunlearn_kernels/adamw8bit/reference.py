"""The step of `adamw8bit_step` in plain PyTorch, tensor by tensor: what runs on CPU, and what its kernel is held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastunlearn_kernels.common.precision import compute_dtype
from fastunlearn_kernels.common.rounding import rounding_halves, to_bf16_stochastic
from fastunlearn_kernels.gradients.operands import ranges, retain_range
from fastunlearn_kernels.quantize.block_chunks import first_elements
from fastunlearn_kernels.quantize.dynamic_code import dequantize_dynamic, quantize_dynamic


class AdamW8bitOperands(NamedTuple):
    """The arguments of the registered op. Lists are as long as `params`; one that is absent is empty."""

    params: Sequence[Tensor]  # written
    copies: Sequence[Tensor]  # written, in another dtype
    grads: Sequence[Tensor]
    retain: Sequence[Tensor]  # floats, or int8 codes with ...
    retain_absmax: Sequence[Tensor]  # ... one scale per 256 elements
    state1: Sequence[Tensor]  # m: fp32, or uint8 codes of the signed map; written, as are all moments
    state2: Sequence[Tensor]  # v: fp32, or uint8 codes of the unsigned map
    absmax1: Sequence[Tensor]  # one scale per 256 codes of m
    absmax2: Sequence[Tensor]  # and of v
    coef_S: Tensor | None  # of the plan, as the next two; None without one
    scale: Tensor | None
    found_inf: Tensor | None
    pieces: Sequence[int]  # `Segments.flat()`; empty without a plan
    beta1: float
    beta2: float
    eps: float
    decay: float  # 1 - lr weight_decay
    step_size: float  # lr / (1 - beta1^t)
    inv_sqrt_bias2: float  # 1 / sqrt(1 - beta2^t)
    stochastic: bool  # how bf16 parameters are rounded
    seed: int

    @property
    def lists(self) -> tuple[Sequence[Tensor], ...]:
        return self[:9]


def adamw8bit_step_reference(given: AdamW8bitOperands) -> None:
    """In place, in plain PyTorch; no branch on what is on the device."""
    params, beta1, beta2 = given.params, given.beta1, given.beta2
    state1, state2, absmax1, absmax2 = given.state1, given.state2, given.absmax1, given.absmax2
    dtype = compute_dtype(*params, *given.grads, *given.retain)
    corrected = corrected_gradients(given, dtype)
    firsts = first_elements([t.numel() for t in params])
    for i, (p, g) in enumerate(zip(params, corrected)):
        if absmax1:
            m = dequantize_dynamic(state1[i], absmax1[i], True, dtype)
            v = dequantize_dynamic(state2[i], absmax2[i], False, dtype)
        else:
            m, v = state1[i].to(dtype), state2[i].to(dtype)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        updated = p.to(dtype) * given.decay - given.step_size * m / (v.sqrt() * given.inv_sqrt_bias2 + given.eps)
        rounded = updated
        if given.stochastic and p.dtype == torch.bfloat16:
            index = torch.arange(p.numel(), device=p.device).view(p.shape) + firsts[i]
            rounded = to_bf16_stochastic(updated, rounding_halves(given.seed, index))
        new = [(p, rounded), *([(given.copies[i], updated)] if given.copies else [])]
        if absmax1:
            (codes1, scales1), (codes2, scales2) = quantize_dynamic(m, True), quantize_dynamic(v, False)
            nan = (scales1 - scales1) + (scales2 - scales2)
            new += [(state1[i], codes1), (state2[i], codes2), (absmax1[i], scales1 + nan), (absmax2[i], scales2 + nan)]
        else:
            new += [(state1[i], m), (state2[i], v)]
        for tensor, value in new:
            value = value.to(tensor.dtype)
            tensor.copy_(value if given.found_inf is None else torch.where(given.found_inf != 0, tensor, value))


def corrected_gradients(given: AdamW8bitOperands, dtype: torch.dtype) -> list[Tensor]:
    """(u - coef r) scale in `dtype`, as `surgery_apply` does it but for the rounding; u where there is no plan."""
    grads, retain, absmax = given.grads, given.retain, given.retain_absmax
    if given.coef_S is None or given.scale is None:
        return [u.to(dtype) for u in grads]
    corrected = [u.to(dtype).reshape(-1).clone() for u in grads]
    flat = [r.reshape(-1) for r in retain]
    for i, begin, end, segment in ranges(given.pieces):
        g = corrected[i][begin:end]
        if retain:
            coef = given.coef_S[segment].to(dtype)
            r = retain_range(flat[i], absmax[i] if absmax else None, begin, end, dtype)
            g.sub_(torch.where(coef == 0, 0.0, coef * r))
        g.mul_(given.scale.to(dtype))
    return [g.view(u.shape) for g, u in zip(corrected, grads)]
