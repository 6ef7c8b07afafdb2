"""What a model's output means: epsilon, v or x0, and the factors between them.

With A = alpha-bar: x = sqrt(A) x0 + sqrt(1 - A) e and v = sqrt(A) e - sqrt(1 - A) x0.

One deterministic step to the next latents is x' = f x + h o for a model's output o: `ddim_factors` (from A to P) and
`euler_factors` (from s to s', where x = x0 + s e). They take no difference of nearly equal rounded numbers: DDIM's h
is (u - v) / sqrt(A) for epsilon, with u = sqrt(A (1 - P)), v = sqrt(P (1 - A)), and u - v = (A - P) / (u + v), where
A - P is exact for neighbours. A = P gives h = 0, also at 0 and 1, where u + v = 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.latent.coefficients import coefficient

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def prediction_number(prediction_type: str) -> int:
    """Its place in PREDICTION_TYPES, as kernels take it. Raises ValueError for an unknown one."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}; got {prediction_type!r}")
    return PREDICTION_TYPES.index(prediction_type)


def residual_factor(alpha: Tensor, prediction: int) -> Tensor | float:
    """By how much the difference of two predictions at the same latents is to be multiplied to become one of noise, up
    to the sign: 1, sqrt(A), sqrt(A / (1 - A))."""
    if prediction == 0:
        return 1.0
    return alpha.sqrt() if prediction == 1 else (alpha / (1 - alpha)).sqrt()


@triton.jit
def residual_factor_scalar(
    alpha,  # alpha-bar, fp32 scalar
    PREDICTION: tl.constexpr,  # place in PREDICTION_TYPES
):
    """The Triton form of `residual_factor`."""
    if PREDICTION == 0:
        factor = alpha * 0 + 1.0
    elif PREDICTION == 1:
        factor = tl.sqrt(alpha)
    else:
        factor = tl.sqrt(alpha / (1 - alpha))
    return factor


def training_target(noise: Tensor | None, x0: Tensor | None, alpha: Tensor, prediction: int) -> Tensor:
    """What the model should have predicted; x0 is not looked at for epsilon, nor the noise for sample."""
    if prediction == 0:
        assert noise is not None
        return noise
    assert x0 is not None
    if prediction == 2:
        return x0
    assert noise is not None
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * x0


@triton.jit
def training_target_tile(
    noise_ptr,  # noise, (B, n); not read for sample
    x0_ptr,  # clean latents, (B, n); not read for epsilon
    alpha,  # alpha-bar, a number or a pointer, see `coefficient`
    i_b,  # sample, int64
    o,  # offsets of the elements in the whole batch, int64
    mask,  # which of them exist
    KIND_A: tl.constexpr,  # kind of alpha
    PREDICTION: tl.constexpr,  # place in PREDICTION_TYPES
):
    """The Triton form of `training_target`, in fp32."""
    if PREDICTION == 2:
        target = tl.load(x0_ptr + o, mask=mask, other=0.0).to(tl.float32)
    else:
        target = tl.load(noise_ptr + o, mask=mask, other=0.0).to(tl.float32)
        if PREDICTION == 1:
            a = coefficient(alpha, i_b, KIND_A)
            x0 = tl.load(x0_ptr + o, mask=mask, other=0.0).to(tl.float32)
            target = tl.sqrt(a) * target - tl.sqrt(1.0 - a) * x0
    return target


def ddim_factors(alpha: Tensor, alpha_prev: Tensor, prediction: int) -> tuple[Tensor, Tensor]:
    """(f, h) of the DDIM step (eta = 0) from alpha-bar `alpha` to `alpha_prev`: x' = f x + h o."""
    u, v = (alpha * (1 - alpha_prev)).sqrt(), (alpha_prev * (1 - alpha)).sqrt()
    difference = alpha - alpha_prev
    h = difference / torch.where(difference == 0, 1.0, u + v)
    if prediction == 0:
        return (alpha_prev / alpha).sqrt(), h / alpha.sqrt()
    if prediction == 1:
        return (alpha * alpha_prev).sqrt() + ((1 - alpha) * (1 - alpha_prev)).sqrt(), h
    return ((1 - alpha_prev) / (1 - alpha)).sqrt(), -h / (1 - alpha).sqrt()


def euler_factors(sigma: Tensor, sigma_next: Tensor, prediction: int) -> tuple[Tensor, Tensor]:
    """(f, h) of the Euler step from noise level `sigma` to `sigma_next`: x' = f x + h o."""
    if prediction == 0:
        return torch.ones_like(sigma), sigma_next - sigma
    if prediction == 1:
        square = sigma * sigma + 1
        return (1 + sigma * sigma_next) / square, (sigma_next - sigma) / square.sqrt()
    return sigma_next / sigma, (sigma - sigma_next) / sigma


@triton.jit
def ddim_factors_scalar(
    alpha, alpha_prev,  # alpha-bar of the two levels, fp32 scalars
    PREDICTION: tl.constexpr,  # place in PREDICTION_TYPES
):  # fmt: skip
    """The Triton form of `ddim_factors`."""
    u, v = tl.sqrt(alpha * (1 - alpha_prev)), tl.sqrt(alpha_prev * (1 - alpha))
    difference = alpha - alpha_prev
    h = difference / tl.where(difference == 0, 1.0, u + v)
    if PREDICTION == 0:
        f, h = tl.sqrt(alpha_prev / alpha), h / tl.sqrt(alpha)
    elif PREDICTION == 1:
        f = tl.sqrt(alpha * alpha_prev) + tl.sqrt((1 - alpha) * (1 - alpha_prev))
    else:
        f, h = tl.sqrt((1 - alpha_prev) / (1 - alpha)), -h / tl.sqrt(1 - alpha)
    return f, h


@triton.jit
def euler_factors_scalar(
    sigma, sigma_next,  # the two noise levels, fp32 scalars
    PREDICTION: tl.constexpr,  # place in PREDICTION_TYPES
):  # fmt: skip
    """The Triton form of `euler_factors`."""
    difference = sigma_next - sigma
    if PREDICTION == 0:
        f, h = sigma * 0 + 1.0, difference
    elif PREDICTION == 1:
        square = sigma * sigma + 1.0
        f, h = (1.0 + sigma * sigma_next) / square, difference / tl.sqrt(square)
    else:
        f, h = sigma_next / sigma, -difference / sigma
    return f, h
