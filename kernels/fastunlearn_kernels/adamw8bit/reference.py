"""The step of `adamw8bit_step` in plain PyTorch, tensor by tensor: what runs on CPU, and what its kernel is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastunlearn_kernels.common.precision import compute_dtype
from fastunlearn_kernels.common.rounding import rounding_halves, to_bf16_stochastic
from fastunlearn_kernels.gradients.operands import ranges, retain_range
from fastunlearn_kernels.quantize.block_chunks import first_numbers
from fastunlearn_kernels.quantize.dynamic_code import dequantize_blockwise, quantize_blockwise


def adamw8bit_step_reference(
    params: Sequence[Tensor], copies: Sequence[Tensor], grads: Sequence[Tensor], retain: Sequence[Tensor],
    retain_absmax: Sequence[Tensor], state1: Sequence[Tensor], state2: Sequence[Tensor], absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor], coef_S: Tensor | None, scale: Tensor | None, found_inf: Tensor | None,
    pieces: Sequence[int], beta1: float, beta2: float, eps: float, decay: float, step_size: float, root: float,
    stochastic: bool, seed: int,
) -> None:  # fmt: skip
    """In place; lists and numbers as the registered op takes them: decay = 1 - lr weight_decay, step_size = lr / (1 -
    beta1^t), root = 1 / sqrt(1 - beta2^t). No branch on what is on the device."""
    dtype = compute_dtype(*params, *grads, *retain)
    corrected = corrected_gradients(grads, retain, retain_absmax, coef_S, scale, pieces, dtype)
    numbers = first_numbers([t.numel() for t in params])
    for i, (p, g) in enumerate(zip(params, corrected)):
        if absmax1:
            m = dequantize_blockwise(state1[i], absmax1[i], True, dtype)
            v = dequantize_blockwise(state2[i], absmax2[i], False, dtype)
        else:
            m, v = state1[i].to(dtype), state2[i].to(dtype)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        updated = p.to(dtype) * decay - step_size * m / (v.sqrt() * root + eps)
        rounded = updated
        if stochastic and p.dtype == torch.bfloat16:
            index = torch.arange(p.numel(), device=p.device).view(p.shape) + numbers[i]
            rounded = to_bf16_stochastic(updated, rounding_halves(seed, index))
        new = [(p, rounded), *([(copies[i], updated)] if copies else [])]
        if absmax1:
            (codes1, scales1), (codes2, scales2) = quantize_blockwise(m, True), quantize_blockwise(v, False)
            nan = (scales1 - scales1) + (scales2 - scales2)
            new += [(state1[i], codes1), (state2[i], codes2), (absmax1[i], scales1 + nan), (absmax2[i], scales2 + nan)]
        else:
            new += [(state1[i], m), (state2[i], v)]
        for tensor, value in new:
            value = value.to(tensor.dtype)
            tensor.copy_(value if found_inf is None else torch.where(found_inf != 0, tensor, value))


def corrected_gradients(
    grads: Sequence[Tensor], retain: Sequence[Tensor], retain_absmax: Sequence[Tensor], coef_S: Tensor | None,
    scale: Tensor | None, pieces: Sequence[int], dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """(u - coef r) scale in `dtype`, as `surgery_apply` does it but for the rounding; u where there is no plan."""
    if coef_S is None or scale is None:
        return [u.to(dtype) for u in grads]
    corrected = [u.to(dtype).reshape(-1).clone() for u in grads]
    flat = [r.reshape(-1) for r in retain]
    for i, begin, end, segment in ranges(pieces):
        g = corrected[i][begin:end]
        if retain:
            coef = coef_S[segment].to(dtype)
            r = retain_range(flat[i], retain_absmax[i] if retain_absmax else None, begin, end, dtype)
            g.sub_(torch.where(coef == 0, 0.0, coef * r))
        g.mul_(scale.to(dtype))
    return [g.view(u.shape) for g, u in zip(corrected, grads)]
