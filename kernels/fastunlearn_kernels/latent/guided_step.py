"""One step along a denoising trajectory: classifier-free guidance and a deterministic DDIM or Euler update.

With A = alpha-bar at this timestep, P at the next, less noisy one; s, s' the noise levels where x = x0 + s e:

    o   = o_0 + w (o_c - o_0)                                           guidance
    x'  = sqrt(P) x0 + sqrt(1 - P) e,  x = sqrt(A) x0 + sqrt(1 - A) e   DDIM (eta = 0)
    x'  = x + (s' - s) (x - x0) / s                                     Euler

For a model that predicts e, v or x0 each is x' = f x + h o with two numbers a sample (see `prediction`). One launch
reads each operand once. Which timesteps there are, and which alpha-bar follows the last of them, the caller decides. No
thresholding, no clipping of x0, no noise added.

Usage: `latents = guided_step(o_c, o_0, latents, A, P, guidance=3.0, prediction_type="epsilon")`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common import backend, scratch
from fastunlearn_kernels.common.precision import check_shapes, compute_dtype
from fastunlearn_kernels.latent.coefficients import (
    Coefficient,
    broadcast,
    coefficient,
    coefficients,
    kernel_arguments,
    no_gradient,
    per_sample,
)
from fastunlearn_kernels.latent.prediction import (
    ddim_factors,
    ddim_factors_scalar,
    euler_factors,
    euler_factors_scalar,
    prediction_number,
)

BLOCK = 1024
RULES = ("ddim", "euler")


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
    kind = prediction_number(prediction_type)
    if kind == 0:
        return model_output
    dtype = compute_dtype(model_output, latents)
    alpha = per_sample(alphas_cumprod_t, latents, dtype)
    signal, noise_level = alpha.sqrt(), (1 - alpha).sqrt()
    output, x = model_output.to(dtype), latents.to(dtype)
    return signal * output + noise_level * x if kind == 1 else (x - signal * output) / noise_level


def ddim_step(
    model_output: Tensor, latents: Tensor, alpha_t: Coefficient, alpha_prev: Coefficient,
    prediction_type: str = "epsilon",
) -> Tensor:  # fmt: skip
    """The DDIM update with eta = 0 from alpha-bar `alpha_t` to `alpha_prev` (one number or B each, fp32 or better).

    Computed in fp32 (fp64 if an input is fp64); the result has the dtype of `latents`.
    Source: Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12.
    """
    return _step(model_output, None, latents, (1.0, alpha_t, alpha_prev), "ddim", prediction_type)


def guided_step(
    cond: Tensor, uncond: Tensor, latents: Tensor, alpha_t: Coefficient, alpha_prev: Coefficient, *,
    guidance: Coefficient, prediction_type: str = "epsilon",
) -> Tensor:  # fmt: skip
    """`ddim_step` of `apply_guidance`: nothing is rounded in between. The result has the dtype of `latents`."""
    return _step(cond, uncond, latents, (guidance, alpha_t, alpha_prev), "ddim", prediction_type)


def guided_euler_step(
    cond: Tensor, uncond: Tensor, latents: Tensor, sigma: Coefficient, sigma_next: Coefficient, *,
    guidance: Coefficient, prediction_type: str = "epsilon",
) -> Tensor:  # fmt: skip
    """The Euler update from noise level `sigma` to `sigma_next` (one number or B each), for latents x0 + sigma n.

    The result has the dtype of `latents`; a model that was trained on latents of variance one is given them divided by
    sqrt(sigma_next^2 + 1).
    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 2 with
    gamma = 0, without the second-order correction.
    """
    return _step(cond, uncond, latents, (guidance, sigma, sigma_next), "euler", prediction_type)


def _step(
    cond: Tensor, uncond: Tensor | None, latents: Tensor, given: tuple[Coefficient, Coefficient, Coefficient],
    rule: str, prediction_type: str,
) -> Tensor:  # fmt: skip
    kind = prediction_number(prediction_type)
    check_shapes("cond", cond, uncond=uncond, latents=latents)
    names = ("alpha_t", "alpha_prev") if rule == "ddim" else ("sigma", "sigma_next")
    sorted_ = coefficients(cond, **dict(zip(("guidance", *names), given, strict=True)))
    return guided_step_op(cond, uncond, latents, sorted_.numbers, sorted_.tables, RULES.index(rule), kind)


class GuidedStepOperands(NamedTuple):
    """The arguments of the registered op."""

    cond: Tensor  # (B, ...)
    uncond: Tensor | None  # its shape; None: no guidance
    latents: Tensor  # its shape
    numbers: Sequence[float]  # guidance and the two levels, where they are numbers ...
    tables: Sequence[Tensor | None]  # ... and where they are tensors of 1 or B elements
    rule: int  # place in RULES
    prediction: int  # place in PREDICTION_TYPES


def _factors(
    numbers: Sequence[float], tables: Sequence[Tensor | None], rule: int, kind: int, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(w, f, h), shaped to broadcast over `like`."""
    guidance, level, next_level = broadcast(numbers, tables, like, dtype)
    return guidance, *(ddim_factors if rule == 0 else euler_factors)(level, next_level, kind)


def guided_step_reference(given: GuidedStepOperands) -> Tensor:
    """x' in plain PyTorch."""
    cond, uncond, latents = given.cond, given.uncond, given.latents
    dtype = compute_dtype(cond, uncond, latents)
    guidance, f, h = _factors(given.numbers, given.tables, given.rule, given.prediction, latents, dtype)
    output = cond.to(dtype) if uncond is None else apply_guidance(cond.to(dtype), uncond, guidance)
    return (f * latents.to(dtype) + h * output).contiguous().to(latents.dtype)


@triton.jit
def guided_step_kernel(
    cond_ptr,  # the model's prediction for the prompt, (B, n)
    uncond_ptr,  # and for the empty one, (B, n), if HAS_UNCOND
    latents_ptr,  # x, (B, n)
    guidance,  # w, a number or a pointer, see `coefficient`
    level,  # alpha-bar (Euler: sigma) of x, likewise
    next_level,  # and of x', likewise
    out_ptr,  # x', written in its dtype, (B, n)
    n,  # elements of a sample
    KIND_G: tl.constexpr,  # kind of guidance
    KIND_L: tl.constexpr,  # kind of level
    KIND_N: tl.constexpr,  # kind of next_level
    EULER: tl.constexpr,  # the rule: Euler, else DDIM
    PREDICTION: tl.constexpr,  # place in PREDICTION_TYPES
    HAS_UNCOND: tl.constexpr,  # whether there is guidance
    BLOCK: tl.constexpr,  # elements of a program
):
    """Program (chunk, sample): BLOCK elements of one sample."""
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < n
    o = i_b * n + o_n
    level_b, next_level_b = coefficient(level, i_b, KIND_L), coefficient(next_level, i_b, KIND_N)
    if EULER:
        f, h = euler_factors_scalar(level_b, next_level_b, PREDICTION)
    else:
        f, h = ddim_factors_scalar(level_b, next_level_b, PREDICTION)
    output = tl.load(cond_ptr + o, mask=mask, other=0.0).to(tl.float32)
    if HAS_UNCOND:
        base = tl.load(uncond_ptr + o, mask=mask, other=0.0).to(tl.float32)
        output = base + coefficient(guidance, i_b, KIND_G) * (output - base)
    x = f * tl.load(latents_ptr + o, mask=mask, other=0.0).to(tl.float32) + h * output
    tl.store(out_ptr + o, x.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(given: GuidedStepOperands) -> Tensor:
    cond, latents = given.cond, given.latents
    batch, n = len(cond), cond[0].numel()
    ins = [None if t is None else t.contiguous() for t in given[:3]]
    out = scratch.empty(latents.shape, latents.dtype, latents.device)
    values, kinds = kernel_arguments(given.numbers, given.tables)
    with backend.on_device(cond):
        guided_step_kernel[(triton.cdiv(n, BLOCK), batch)](
            *ins, *values, out, n, *kinds, EULER=given.rule == 1, PREDICTION=given.prediction,
            HAS_UNCOND=given.uncond is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return out


@torch.library.custom_op("fastunlearn::guided_step", mutates_args=())
def guided_step_op(
    cond: Tensor, uncond: Tensor | None, latents: Tensor, numbers: Sequence[float], tables: Sequence[Tensor | None],
    rule: int, prediction: int,
) -> Tensor:  # fmt: skip
    """As `guided_step_reference`; on a GPU one launch."""
    given = GuidedStepOperands(cond, uncond, latents, numbers, tables, rule, prediction)
    on_gpu = cond.numel() and backend.runs_triton([*given[:3], *tables])
    return (_launch if on_gpu else guided_step_reference)(given)


@guided_step_op.register_fake
def _fake(cond, uncond, latents, numbers, tables, rule, prediction):
    return latents.new_empty(latents.shape)


def _save(ctx, inputs, output):
    cond, uncond, latents, ctx.numbers, tables, ctx.rule, ctx.prediction = inputs
    ctx.save_for_backward(*tables)
    ctx.dtypes = cond.dtype, None if uncond is None else uncond.dtype, latents.dtype
    ctx.dtype = compute_dtype(cond, uncond, latents)


def _backward(ctx, grad):
    """x' is linear in all three."""
    guidance, f, h = _factors(ctx.numbers, ctx.saved_tensors, ctx.rule, ctx.prediction, grad, ctx.dtype)
    total = grad.to(ctx.dtype)
    of_cond, of_uncond, of_latents = ctx.dtypes
    output, rest = h * total, ((f * total).to(of_latents), None, no_gradient(ctx.saved_tensors), None, None)
    if of_uncond is None:
        return output.to(of_cond), None, *rest
    return (guidance * output).to(of_cond), ((1 - guidance) * output).to(of_uncond), *rest


guided_step_op.register_autograd(_backward, setup_context=_save)
