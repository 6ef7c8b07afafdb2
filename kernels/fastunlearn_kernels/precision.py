"""In which precision the ops compute, and how per-sample coefficients meet (B, C, H, W) tensors.

Not a mixed-precision policy: that is the trainer's. Here every op computes in fp32, whatever comes in, and in fp64 when
anything that comes in is fp64 (gradient checks, oracles).
"""

from __future__ import annotations

import torch
from torch import Tensor

# A coefficient: one number, or one number per sample.
Coefficient = float | Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any of the tensors is fp64, else fp32. None counts as absent."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def per_sample(value: Coefficient, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` (a number, a 0-d tensor or B numbers) on the device of `like`, shaped to broadcast over (B, ...).

    Raises ValueError for any other number of values, and for half-precision tables: bf16 keeps 8 bits, so that a
    coefficient near 1 loses what separates it from 1.
    """
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"coefficients must be float32 or float64, got {value.dtype}: compute them before casting")
    coefficient = torch.as_tensor(value, dtype=dtype, device=like.device).detach()
    if coefficient.numel() not in (1, like.shape[0]):
        raise ValueError(f"expected 1 or {like.shape[0]} coefficients, got {coefficient.numel()}")
    return coefficient.reshape(-1, *[1] * (like.dim() - 1))
