"""One step along a denoising trajectory: classifier-free guidance and the deterministic (eta = 0) DDIM update.

With a = alpha-bar at this timestep and p = alpha-bar at the next, less noisy one:

    e   = e_0 + w (e_c - e_0)                                           guidance
    x0  = (x - sqrt(1 - a) e) / sqrt(a)
    x'  = sqrt(p) x0 + sqrt(1 - p) e                                    DDIM

A model that predicts v = sqrt(a) e - sqrt(1 - a) x0, or x0 itself, is converted first. Not a scheduler: which timesteps
there are, and which alpha-bar follows the last of them, the caller decides. No thresholding, no clipping of x0.

Usage: `latents = guided_step(e_c, e_0, latents, a, p, guidance=3.0, prediction_type="epsilon")`
"""

from __future__ import annotations

from torch import Tensor

from fastunlearn_kernels.precision import Coefficient, compute_dtype, per_sample
from fastunlearn_kernels.prediction import PREDICTION_TYPES


def apply_guidance(cond: Tensor, uncond: Tensor, guidance: Coefficient) -> Tensor:
    """uncond + guidance (cond - uncond), in fp32 (fp64 if an input is fp64). `guidance` is one number or B of them."""
    dtype = compute_dtype(cond, uncond)
    base = uncond.to(dtype)
    return base + per_sample(guidance, cond, dtype) * (cond.to(dtype) - base)


def to_epsilon(model_output: Tensor, latents: Tensor, alphas_cumprod_t: Coefficient, prediction_type: str) -> Tensor:
    """What the model's output says about the noise in `latents`; linear in `model_output`, gradients flow.

    epsilon is handed back as it came; v_prediction and sample are computed and returned in fp32 (fp64 if an input is).
    `alphas_cumprod_t` is one number or B of them, fp32 or better. Raises ValueError for an unknown prediction type.
    """
    _check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return model_output
    return _noise_and_image(model_output, latents, alphas_cumprod_t, prediction_type)[0]


def ddim_step(
    model_output: Tensor,
    latents: Tensor,
    alpha_t: Coefficient,
    alpha_prev: Coefficient,
    prediction_type: str = "epsilon",
) -> Tensor:
    """The DDIM update with eta = 0 from alpha-bar `alpha_t` to `alpha_prev` (one number or B each, fp32 or better).

    Computed in fp32 (fp64 if an input is fp64); the result has the dtype of `latents`.
    Source: Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12.
    """
    _check_prediction_type(prediction_type)
    noise, image = _noise_and_image(model_output, latents, alpha_t, prediction_type)
    alpha_prev = per_sample(alpha_prev, latents, noise.dtype)
    return (alpha_prev.sqrt() * image + (1 - alpha_prev).sqrt() * noise).to(latents.dtype)


def guided_step(
    cond: Tensor,
    uncond: Tensor,
    latents: Tensor,
    alpha_t: Coefficient,
    alpha_prev: Coefficient,
    *,
    guidance: Coefficient,
    prediction_type: str = "epsilon",
) -> Tensor:
    """`ddim_step` of `apply_guidance`: nothing is rounded in between. The result has the dtype of `latents`."""
    return ddim_step(apply_guidance(cond, uncond, guidance), latents, alpha_t, alpha_prev, prediction_type)


def _noise_and_image(
    model_output: Tensor, latents: Tensor, alpha: Coefficient, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """(e, x0) from one model output."""
    dtype = compute_dtype(model_output, latents)
    alpha = per_sample(alpha, latents, dtype)
    signal, noise_level = alpha.sqrt(), (1 - alpha).sqrt()
    output, x = model_output.to(dtype), latents.to(dtype)
    if prediction_type == "epsilon":
        return output, (x - noise_level * output) / signal
    if prediction_type == "v_prediction":
        return signal * output + noise_level * x, signal * x - noise_level * output
    return (x - signal * output) / noise_level, output


def _check_prediction_type(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}; got {prediction_type!r}")
