"""The forward process: bring clean latents to a timestep.

    x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) n

The table stays fp32 and is indexed per sample: schedulers that cast it to the dtype of the latents lose the small
noise levels (1 - ab_t is about 1e-3 at the last timesteps, bf16 near 1 resolves 4e-3).

Usage: `latents = add_noise(x0, noise, timesteps, alphas_cumprod)`
"""

from __future__ import annotations

from torch import Tensor

from fastunlearn_kernels.precision import compute_dtype, per_sample


def add_noise(x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Noisy latents, shape and dtype of `x0`, computed in fp32 (fp64 if x0 or noise is fp64).

    Args:
        x0, noise: (B, C, H, W), any float dtype. timesteps: (B,) or 0-d, integer, indices into the table.
        alphas_cumprod: (T,) table of alpha-bar, fp32 or fp64, on the device of `x0`.

    Raises:
        ValueError: shapes differ, or the table is in half precision.
    """
    if noise.shape != x0.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, x0 has {tuple(x0.shape)}")
    dtype = compute_dtype(x0, noise)
    alpha = per_sample(alphas_cumprod[timesteps], x0, dtype)
    return (alpha.sqrt() * x0.to(dtype) + (1 - alpha).sqrt() * noise.to(dtype)).to(x0.dtype)
