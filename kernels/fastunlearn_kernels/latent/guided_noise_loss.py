"""The key-step-masked loss of KSCU, ESD and SDD: negative guidance as a regression target, weighted per sample.

With D = e(x, t, c) - e(x, t, a), the frozen model's direction from the anchor `a` to the concept `c`:

    y_c    = e(x, t, a) - g D                                           conditional target
    y_0    = e(x, t, 0) - lambda1 D                                     unconditional target
    loss_b = mean(h(k (s(x, t, c) - y_c))) + lambda2 mean(h(k (s(x, t, 0) - y_0)))
    loss   = 1/B sum_b w_b loss_b

s is the model in training, w_b the key-step weight of sample b, h the square or Huber's function (r^2 up to delta, then
2 delta |r| - delta^2). The loss is one between noise estimates whatever the model predicts: both targets combine
predictions with coefficients that add up to one, so the latents cancel and only a factor is left, with alpha-bar A:
k = 1 (epsilon), sqrt(A) (v_prediction), sqrt(A / (1 - A)) (sample). KSCU as published has a = 0, the empty prompt;
without the unconditional branch this is ESD's loss, with g = 0 as well SDD's. Which prompts, timesteps and weights is
the trainer's business.

One launch: every program writes its part of the sum and draws a ticket; the one with the last ticket adds the parts in
a fixed order in fp64. The gradients come out of the same pass.

Usage: `loss, loss_B, found_inf = guided_noise_loss(s_c, s_0, e_c, e_a, e_0, guidance=1.0, lambda1_B=..., ...)`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common import backend, scratch
from fastunlearn_kernels.common.precision import check_shapes, compute_dtype, ordered_sum
from fastunlearn_kernels.latent.coefficients import (
    Coefficient,
    broadcast,
    coefficient,
    coefficients,
    kernel_arguments,
    no_gradient,
)
from fastunlearn_kernels.latent.prediction import prediction_number, residual_factor, residual_factor_scalar
from fastunlearn_kernels.testing.spec import SHORT, AotKernel, Case, Inputs, OpSpec, Outputs
from fastunlearn_kernels.testing.specs.guided_noise_loss import (
    PREDICTIONS,
    broken,
    bytes_moved,
    eager,
    inputs_of,
    masked,
)

BLOCK = 1024


class NoiseLoss(NamedTuple):
    """loss: fp32 scalar (fp64 if an input is), with graph. per_sample_B: loss_b without w_b, detached; 0 if w_b is 0.
    found_inf: fp32 scalar on the device, 1 if the loss is not finite, else 0 (torch.amp's convention)."""

    loss: Tensor
    per_sample_B: Tensor
    found_inf: Tensor


def guided_noise_loss(
    cond: Tensor,
    uncond: Tensor | None,
    teacher_cond: Tensor,
    teacher_anchor: Tensor,
    teacher_uncond: Tensor | None,
    *,
    guidance: Coefficient,
    lambda1_B: Coefficient = 0.0,
    uncond_weight: float = 0.0,
    weight_B: Coefficient = 1.0,
    alpha_t: Coefficient | None = None,
    prediction_type: str = "epsilon",
    huber_delta: float | None = None,
) -> NoiseLoss:
    """The loss, its per-sample parts and a flag; gradients reach `cond` and `uncond`, once (no double backward).

    Args:
        cond, uncond: student predictions for the concept and the empty prompt, (B, C, H, W), any float dtype.
            `uncond=None` switches the unconditional branch off; then `teacher_uncond` may be None too.
        teacher_cond, teacher_anchor, teacher_uncond: frozen predictions of the same shape; no gradient reaches them.
            Handing in the same tensor as anchor and as uncond (the published rule) saves a read.
        guidance: g. lambda1_B: lambda1. weight_B: key-step weight. alpha_t: alpha-bar, needed unless the model predicts
            epsilon. Each is one number or one per sample. uncond_weight: lambda2.
            A sample of weight 0 is not read: it has no influence on anything, even if its values are not finite.
        huber_delta: None for the squared error.

    Raises:
        ValueError: shapes differ, `uncond` comes without `teacher_uncond`, or the prediction type is unknown.
    """
    teachers = {"teacher_cond": teacher_cond, "teacher_anchor": teacher_anchor, "teacher_uncond": teacher_uncond}
    check_shapes("cond", cond, uncond=uncond, **teachers)
    if uncond is not None and teacher_uncond is None:
        raise ValueError("uncond needs teacher_uncond: without it there is no target for the unconditional branch")
    if uncond is None or teacher_uncond is teacher_anchor:
        teacher_uncond = None  # not needed, or read already
    kind, alpha = prediction_number(prediction_type), 1.0 if alpha_t is None else alpha_t
    if kind != 0 and alpha_t is None:
        raise ValueError(f"prediction_type {prediction_type!r} needs alpha_t")
    given = coefficients(cond, guidance=guidance, lambda1_B=lambda1_B, weight_B=weight_B, alpha_t=alpha)
    teachers_ = [None if t is None else t.detach() for t in (teacher_cond, teacher_anchor, teacher_uncond)]
    delta = -1.0 if huber_delta is None else float(huber_delta)
    out = guided_noise_loss_op(cond, uncond, *teachers_, given.numbers, given.tables, uncond_weight, delta, kind)
    return NoiseLoss(*out[:3])


def guided_noise_loss_reference(
    cond: Tensor, uncond: Tensor | None, teacher_cond: Tensor, teacher_anchor: Tensor, teacher_uncond: Tensor | None,
    numbers: Sequence[float], tables: Sequence[Tensor | None], uncond_weight: float, delta: float, prediction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, per_sample_B, found_inf, dloss/dcond, dloss/duncond) in plain PyTorch, itself differentiable.

    Arguments as the registered op's: `numbers` and `tables` hold guidance, lambda1, weight and alpha-bar;
    `teacher_uncond=None` means the anchor's prediction; delta < 0 is the squared error.
    """
    dtype = compute_dtype(cond, uncond, teacher_cond, teacher_anchor, teacher_uncond)
    guidance, lambda1, weight, alpha = broadcast(numbers, tables, cond, dtype)
    factor = residual_factor(alpha, prediction)
    anchor = teacher_anchor.to(dtype)
    direction = teacher_cond.to(dtype) - anchor
    elements = max(cond.numel(), 1)

    def mean_B_and_gradient(student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        # Masked before the error is taken, so that 0 * NaN arises in no pass.
        residual = (factor * (student.to(dtype) - target)).masked_fill(weight == 0, 0.0)
        clipped = residual if delta < 0 else residual.clamp(-delta, delta)
        errors = (clipped * (2 * residual - clipped)).flatten(1)
        gradient = (2 * weight * factor / elements).masked_fill(weight == 0, 0.0) * clipped
        return errors.sum(1) / max(errors.shape[1], 1), gradient

    loss_B, grad_cond = mean_B_and_gradient(cond, anchor - guidance * direction)
    grad_uncond = cond.new_zeros(0, dtype=dtype)
    if uncond is not None:
        base = anchor if teacher_uncond is None else teacher_uncond.to(dtype)
        uncond_B, gradient = mean_B_and_gradient(uncond, base - lambda1 * direction)
        loss_B, grad_uncond = loss_B + uncond_weight * uncond_B, uncond_weight * gradient
    loss = (weight.flatten() * loss_B).sum() / max(cond.shape[0], 1)
    found_inf = (~loss.detach().isfinite()).to(torch.float32)
    stored = compute_dtype(cond)
    return loss, loss_B.detach(), found_inf, grad_cond.to(stored), grad_uncond.to(stored)


@triton.jit
def guided_noise_loss_kernel(
    cond_ptr, uncond_ptr, teacher_cond_ptr, teacher_anchor_ptr, teacher_uncond_ptr,
    guidance, lambda1, weight, alpha,
    grad_cond_ptr, grad_uncond_ptr, partial_ptr, ticket_ptr, loss_ptr, loss_B_ptr, found_inf_ptr,
    n, uncond_weight, delta,
    KIND_G: tl.constexpr, KIND_L: tl.constexpr, KIND_W: tl.constexpr, KIND_A: tl.constexpr,
    PREDICTION: tl.constexpr, HAS_UNCOND: tl.constexpr, HAS_TEACHER_UNCOND: tl.constexpr, HUBER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (chunk, sample): residuals and gradients of BLOCK elements; the last program of all sums the losses."""
    i_chunk, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunks, batch = tl.num_programs(0), tl.num_programs(1)
    o_n = i_chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < n
    o = i_b * n + o_n
    w = coefficient(weight, i_b, KIND_W)
    total = 0.0
    if w != 0:
        k = residual_factor_scalar(coefficient(alpha, i_b, KIND_A), PREDICTION)
        step = 2.0 * w * k / (1.0 * batch * n)
        anchor = tl.load(teacher_anchor_ptr + o, mask=mask, other=0.0).to(tl.float32)
        direction = tl.load(teacher_cond_ptr + o, mask=mask, other=0.0).to(tl.float32) - anchor
        student = tl.load(cond_ptr + o, mask=mask, other=0.0).to(tl.float32)
        residual = k * (student - (anchor - coefficient(guidance, i_b, KIND_G) * direction))
        clipped = _clip(residual, delta, HUBER)
        errors = clipped * (2 * residual - clipped)
        tl.store(grad_cond_ptr + o, step * clipped, mask=mask)
        if HAS_UNCOND:
            if HAS_TEACHER_UNCOND:
                base = tl.load(teacher_uncond_ptr + o, mask=mask, other=0.0).to(tl.float32)
            else:
                base = anchor
            student = tl.load(uncond_ptr + o, mask=mask, other=0.0).to(tl.float32)
            residual = k * (student - (base - coefficient(lambda1, i_b, KIND_L) * direction))
            clipped = _clip(residual, delta, HUBER)
            errors += uncond_weight * (clipped * (2 * residual - clipped))
            clipped *= uncond_weight
            tl.store(grad_uncond_ptr + o, step * clipped, mask=mask)
        total = tl.sum(tl.where(mask, errors, 0.0))
    else:
        zero = tl.zeros([BLOCK], tl.float32)
        tl.store(grad_cond_ptr + o, zero, mask=mask)
        if HAS_UNCOND:
            tl.store(grad_uncond_ptr + o, zero, mask=mask)
    tl.store(partial_ptr + i_b * chunks + i_chunk, total)
    tl.debug_barrier()  # all of the part is written before the ticket is drawn
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == chunks * batch - 1:
        loss = tl.zeros([], tl.float64)
        for b in range(batch):
            mean = ordered_sum(partial_ptr + b * chunks, chunks, BLOCK) / n
            tl.store(loss_B_ptr + b, mean.to(tl.float32))
            loss += coefficient(weight, b, KIND_W) * mean
        loss = (loss / batch).to(tl.float32)
        tl.store(loss_ptr, loss)
        tl.store(found_inf_ptr, tl.where(loss - loss == 0, 0.0, 1.0))
        tl.store(ticket_ptr, 0)


@triton.jit
def _clip(residual, delta, HUBER: tl.constexpr):
    """Half the derivative of h. NaN stays NaN, so that it reaches the loss."""
    if HUBER:
        residual = tl.where(residual > delta, delta, tl.where(residual < -delta, -delta, residual))
    return residual


def _launch(
    cond: Tensor, uncond: Tensor | None, teacher_cond: Tensor, teacher_anchor: Tensor, teacher_uncond: Tensor | None,
    numbers: Sequence[float], tables: Sequence[Tensor | None], uncond_weight: float, delta: float, prediction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    device, batch, n = cond.device, cond.shape[0], cond[0].numel()
    ins = [None if t is None else t.contiguous() for t in (cond, uncond, teacher_cond, teacher_anchor, teacher_uncond)]
    chunks = triton.cdiv(n, BLOCK)
    grad_cond = scratch.empty(cond.shape, torch.float32, device)
    grad_uncond = scratch.empty((0,) if uncond is None else uncond.shape, torch.float32, device)
    partial = scratch.empty((batch * chunks,), torch.float32, device)
    loss, found_inf = scratch.empty((), torch.float32, device), scratch.empty((), torch.float32, device)
    loss_B = scratch.empty((batch,), torch.float32, device)
    given, kinds = kernel_arguments(numbers, tables)
    with backend.on_device(cond):
        guided_noise_loss_kernel[(chunks, batch)](
            *ins, *given, grad_cond, grad_uncond, partial, scratch.ticket(device), loss, loss_B, found_inf,
            n, uncond_weight, delta, *kinds, PREDICTION=prediction, HAS_UNCOND=uncond is not None,
            HAS_TEACHER_UNCOND=teacher_uncond is not None, HUBER=delta >= 0, BLOCK=BLOCK,
        )  # fmt: skip
    return loss, loss_B, found_inf, grad_cond, grad_uncond


@torch.library.custom_op("fastunlearn::guided_noise_loss", mutates_args=())
def guided_noise_loss_op(
    cond: Tensor, uncond: Tensor | None, teacher_cond: Tensor, teacher_anchor: Tensor, teacher_uncond: Tensor | None,
    numbers: Sequence[float], tables: Sequence[Tensor | None], uncond_weight: float, delta: float, prediction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `guided_noise_loss_reference`; on a GPU one launch."""
    given = (cond, uncond, teacher_cond, teacher_anchor, teacher_uncond)
    run = _launch if cond.numel() and backend.runs_triton([*given, *tables]) else guided_noise_loss_reference
    return run(*given, numbers, tables, uncond_weight, delta, prediction)


@guided_noise_loss_op.register_fake
def _fake(cond, uncond, teacher_cond, teacher_anchor, teacher_uncond, *_):
    dtype, stored = compute_dtype(cond, uncond, teacher_cond, teacher_anchor, teacher_uncond), compute_dtype(cond)
    grad_cond = cond.new_empty(cond.shape, dtype=stored)
    grad_uncond = cond.new_empty((0,) if uncond is None else uncond.shape, dtype=stored)
    flag = cond.new_empty((), dtype=torch.float32)
    return cond.new_empty((), dtype=dtype), cond.new_empty((len(cond),), dtype=dtype), flag, grad_cond, grad_uncond


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype, ctx.has_uncond, ctx.tables = inputs[0].dtype, inputs[1] is not None, no_gradient(inputs[6])


def _backward(ctx, grad_loss, *_):
    grad_cond, grad_uncond = (grad_loss * grad for grad in ctx.saved_tensors)
    grad_uncond = grad_uncond.to(ctx.dtype) if ctx.has_uncond else None
    return grad_cond.to(ctx.dtype), grad_uncond, None, None, None, None, ctx.tables, None, None, None


guided_noise_loss_op.register_autograd(_backward, setup_context=_save)


def _run(inputs: Inputs) -> Outputs:
    out = guided_noise_loss(**inputs)
    return {"loss": out.loss, "per_sample_B": out.per_sample_B, "found_inf": out.found_inf}


def _kernel(name: str, dtype: str, **options: Any) -> AotKernel:
    latents = [f"{name}_ptr" for name in PREDICTIONS]
    stored = {name: "*fp32" for name in ("grad_cond_ptr", "grad_uncond_ptr")}
    constants = {"KIND_G": 0, "KIND_L": 2, "KIND_W": 2, "KIND_A": 2, "PREDICTION": 1, "HUBER": False, "BLOCK": BLOCK}
    constants |= {"HAS_UNCOND": True, "HAS_TEACHER_UNCOND": True} | options
    signature = {name: f"*{dtype}" for name in latents}
    signature |= {"guidance": "fp32", "lambda1": "*fp32", "weight": "*fp32", "alpha": "*fp32"} | stored
    signature |= {f"{name}_ptr": "*fp32" for name in ("partial", "loss", "loss_B", "found_inf")}
    signature |= {"ticket_ptr": "*i32", "n": "i32", "uncond_weight": "fp32", "delta": "fp32"}
    signature |= {name: "constexpr" for name in constants}
    return AotKernel(name, guided_noise_loss_kernel, signature, constants, (*latents, *stored, "n"), elements=BLOCK)


SPEC = OpSpec(
    name="guided_noise_loss",
    run=_run,
    eager=eager,
    cases=(
        Case("0 elements", inputs_of((0, 4, 8, 8))),
        Case("1 element", inputs_of((1, 1, 1, 1))),
        Case("63 elements", inputs_of((3, 1, 7, 9))),
        Case("1000 elements", inputs_of((2, 1000), guidance=torch.tensor([1.0, 3.0]))),
        Case("several chunks", inputs_of((2, 4, 33, 31))),
        Case("unaligned", inputs_of((2, 4, 16, 16), "unaligned")),
        Case("transposed", inputs_of((2, 4, 6, 10), "transposed")),
        Case("strided", inputs_of((2, 4, 6, 10), "strided")),
        Case("conditional only", inputs_of((2, 4, 8, 8), uncond=False)),
        Case("v prediction", inputs_of((2, 4, 8, 8), prediction_type="v_prediction", alpha_t=torch.tensor([0.1, 0.9]))),
        Case("x0 prediction", inputs_of((2, 4, 8, 8), prediction_type="sample", alpha_t=0.4)),
        Case("huber", inputs_of((2, 4, 8, 8), huber_delta=0.7)),
        Case("masked samples", masked),
        Case("NaN in a sample that counts", broken),
        Case("large values", inputs_of((2, 4, 8, 8), scale=1e4), (torch.float32, torch.bfloat16)),
    ),
    gradients=("cond", "uncond"),
    of_gradient="loss",
    bytes_moved=bytes_moved,
    launches=1,
    latent=True,
    kernels=(
        *[_kernel(dtype, dtype) for dtype in SHORT.values()],
        _kernel("bf16 conditional only, huber", "bf16", HAS_UNCOND=False, HAS_TEACHER_UNCOND=False, HUBER=True),
    ),
    bench=lambda numel, dtype, device: inputs_of((1, 4, numel // 4))(torch.Generator().manual_seed(0), dtype, device),
)
