"""The loss of KSCU, ESD and SDD: negative guidance as a regression target.

With D = e(x, t, c) - e(x, t, a), the frozen model's direction from the anchor `a` to the concept `c`:

    y_c    = e(x, t, a) - g D                                           conditional target
    y_0    = e(x, t, 0) - lambda1 D                                     unconditional target
    loss_b = mean((k (s(x, t, c) - y_c))^2) + lambda2 mean((k (s(x, t, 0) - y_0))^2)
    loss   = 1/B sum_b loss_b

s is the model in training. The loss is one between noise estimates whatever the model predicts: both targets combine
predictions with coefficients that add up to one, so the latents cancel and only a factor is left, with alpha-bar A:
k = 1 (epsilon), sqrt(A) (v_prediction), sqrt(A / (1 - A)) (sample). KSCU as published has a = 0, the empty prompt;
without the unconditional branch this is ESD's loss, with g = 0 as well SDD's. Which prompts and timesteps is the
trainer's business.

One launch: every program writes its part of the sum and draws a ticket; the one with the last ticket adds the parts in
a fixed order in fp64. The gradients come out of the same pass.

Usage: `loss, loss_B, found_inf = guided_noise_loss(s_c, s_0, e_c, e_a, e_0, guidance=1.0, lambda1_B=..., ...)`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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

BLOCK = 1024


class NoiseLoss(NamedTuple):
    """loss: fp32 scalar (fp64 if an input is), with graph. per_sample_B: loss_b, detached. found_inf: fp32 scalar on
    the device, 1 if the loss is not finite, else 0 (torch.amp's convention)."""

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
    alpha_t: Coefficient | None = None,
    prediction_type: str = "epsilon",
) -> NoiseLoss:
    """The loss, its per-sample parts and a flag; gradients reach `cond` and `uncond`, once (no double backward).

    Args:
        cond, uncond: student predictions for the concept and the empty prompt, (B, C, H, W), any float dtype.
            `uncond=None` switches the unconditional branch off; then `teacher_uncond` may be None too.
        teacher_cond, teacher_anchor, teacher_uncond: frozen predictions of the same shape; no gradient reaches them.
            Handing in the same tensor as anchor and as uncond (the published rule) saves a read.
        guidance: g. lambda1_B: lambda1. alpha_t: alpha-bar, needed unless the model predicts epsilon. Each is one
            number or one per sample. uncond_weight: lambda2.

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
    given = coefficients(cond, guidance=guidance, lambda1_B=lambda1_B, alpha_t=alpha)
    teachers_ = [None if t is None else t.detach() for t in (teacher_cond, teacher_anchor, teacher_uncond)]
    out = guided_noise_loss_op(cond, uncond, *teachers_, given.numbers, given.tables, uncond_weight, kind)
    return NoiseLoss(*out[:3])


class GuidedLossOperands(NamedTuple):
    """The arguments of the registered op. Predictions are (B, ...); `teacher_uncond` None means the anchor's."""

    cond: Tensor
    uncond: Tensor | None
    teacher_cond: Tensor
    teacher_anchor: Tensor
    teacher_uncond: Tensor | None
    numbers: Sequence[float]  # guidance, lambda1 and alpha-bar, where they are numbers ...
    tables: Sequence[Tensor | None]  # ... and where they are tensors of 1 or B elements
    uncond_weight: float
    prediction: int  # place in PREDICTION_TYPES

    @property
    def predictions(self) -> tuple[Tensor | None, ...]:
        return self[:5]


def guided_noise_loss_reference(given: GuidedLossOperands) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, per_sample_B, found_inf, dloss/dcond, dloss/duncond) in plain PyTorch, itself differentiable."""
    cond, uncond = given.cond, given.uncond
    dtype = compute_dtype(*given.predictions)
    guidance, lambda1, alpha = broadcast(given.numbers, given.tables, cond, dtype)
    factor = residual_factor(alpha, given.prediction)
    anchor = given.teacher_anchor.to(dtype)
    direction = given.teacher_cond.to(dtype) - anchor
    elements = max(cond.numel(), 1)

    def mean_B_and_gradient(student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        residual = factor * (student.to(dtype) - target)
        errors = residual.square().flatten(1)
        return errors.sum(1) / max(errors.shape[1], 1), 2 * factor / elements * residual

    loss_B, grad_cond = mean_B_and_gradient(cond, anchor - guidance * direction)
    grad_uncond = cond.new_zeros(0, dtype=dtype)
    if uncond is not None:
        base = anchor if given.teacher_uncond is None else given.teacher_uncond.to(dtype)
        uncond_B, gradient = mean_B_and_gradient(uncond, base - lambda1 * direction)
        loss_B, grad_uncond = loss_B + given.uncond_weight * uncond_B, given.uncond_weight * gradient
    loss = loss_B.sum() / max(cond.shape[0], 1)
    found_inf = (~loss.detach().isfinite()).to(torch.float32)
    stored = compute_dtype(cond)
    return loss, loss_B.detach(), found_inf, grad_cond.to(stored), grad_uncond.to(stored)


@triton.jit
def guided_noise_loss_kernel(
    cond_ptr,  # the student's prediction for the concept, (B, n)
    uncond_ptr,  # and for the empty prompt, (B, n), if HAS_UNCOND
    teacher_cond_ptr,  # the frozen model's for the concept, (B, n)
    teacher_anchor_ptr,  # for the anchor, (B, n)
    teacher_uncond_ptr,  # for the empty prompt, (B, n), if HAS_TEACHER_UNCOND; else the anchor's is it
    guidance,  # g, a number or a pointer, see `coefficient`
    lambda1,  # the same of the unconditional target
    alpha,  # alpha-bar, likewise
    grad_cond_ptr,  # dloss/dcond, fp32, (B, n), written
    grad_uncond_ptr,  # dloss/duncond, fp32, (B, n), written if HAS_UNCOND
    partial_ptr,  # each program's part of the sum, fp32, (B, chunks), written
    ticket_ptr,  # int32, (1,), 0 before and after
    loss_ptr,  # fp32, (1,), written by the last program
    loss_B_ptr,  # fp32, (B,), written by the last program
    found_inf_ptr,  # fp32, (1,), written by the last program
    n,  # elements of a sample
    uncond_weight,  # lambda2
    KIND_G: tl.constexpr,  # kind of guidance
    KIND_L: tl.constexpr,  # kind of lambda1
    KIND_A: tl.constexpr,  # kind of alpha
    PREDICTION: tl.constexpr,  # place in PREDICTION_TYPES
    HAS_UNCOND: tl.constexpr,  # whether there is an unconditional branch
    HAS_TEACHER_UNCOND: tl.constexpr,  # whether its base is not the anchor's prediction
    BLOCK: tl.constexpr,  # elements of a program
):
    """Program (chunk, sample): residuals and gradients of BLOCK elements; the last program of all sums the losses."""
    i_chunk, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunks, batch = tl.num_programs(0), tl.num_programs(1)
    o_n = i_chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < n
    o = i_b * n + o_n
    k = residual_factor_scalar(coefficient(alpha, i_b, KIND_A), PREDICTION)
    step = 2.0 * k / (1.0 * batch * n)
    anchor = tl.load(teacher_anchor_ptr + o, mask=mask, other=0.0).to(tl.float32)
    direction = tl.load(teacher_cond_ptr + o, mask=mask, other=0.0).to(tl.float32) - anchor
    student = tl.load(cond_ptr + o, mask=mask, other=0.0).to(tl.float32)
    residual = k * (student - (anchor - coefficient(guidance, i_b, KIND_G) * direction))
    errors = residual * residual
    tl.store(grad_cond_ptr + o, step * residual, mask=mask)
    if HAS_UNCOND:
        if HAS_TEACHER_UNCOND:
            base = tl.load(teacher_uncond_ptr + o, mask=mask, other=0.0).to(tl.float32)
        else:
            base = anchor
        student = tl.load(uncond_ptr + o, mask=mask, other=0.0).to(tl.float32)
        residual = k * (student - (base - coefficient(lambda1, i_b, KIND_L) * direction))
        errors += uncond_weight * (residual * residual)
        residual *= uncond_weight
        tl.store(grad_uncond_ptr + o, step * residual, mask=mask)
    total = tl.sum(tl.where(mask, errors, 0.0))
    tl.store(partial_ptr + i_b * chunks + i_chunk, total)
    tl.debug_barrier()  # all of the part is written before the ticket is drawn
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == chunks * batch - 1:
        loss = tl.zeros([], tl.float64)
        for b in range(batch):
            mean = ordered_sum(partial_ptr + b * chunks, chunks, BLOCK) / n
            tl.store(loss_B_ptr + b, mean.to(tl.float32))
            loss += mean
        loss = (loss / batch).to(tl.float32)
        tl.store(loss_ptr, loss)
        tl.store(found_inf_ptr, tl.where(loss - loss == 0, 0.0, 1.0))
        tl.store(ticket_ptr, 0)


def _launch(given: GuidedLossOperands) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cond, uncond, device = given.cond, given.uncond, given.cond.device
    batch, n = cond.shape[0], cond[0].numel()
    ins = [None if t is None else t.contiguous() for t in given.predictions]
    chunks = triton.cdiv(n, BLOCK)
    grad_cond = scratch.empty(cond.shape, torch.float32, device)
    grad_uncond = scratch.empty((0,) if uncond is None else uncond.shape, torch.float32, device)
    partial = scratch.empty((batch * chunks,), torch.float32, device)
    loss, found_inf = scratch.empty((), torch.float32, device), scratch.empty((), torch.float32, device)
    loss_B = scratch.empty((batch,), torch.float32, device)
    values, kinds = kernel_arguments(given.numbers, given.tables)
    with backend.on_device(cond):
        guided_noise_loss_kernel[(chunks, batch)](
            *ins, *values, grad_cond, grad_uncond, partial, scratch.ticket(device), loss, loss_B, found_inf,
            n, given.uncond_weight, *kinds, PREDICTION=given.prediction, HAS_UNCOND=uncond is not None,
            HAS_TEACHER_UNCOND=given.teacher_uncond is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return loss, loss_B, found_inf, grad_cond, grad_uncond


@torch.library.custom_op("fastunlearn::guided_noise_loss", mutates_args=())
def guided_noise_loss_op(
    cond: Tensor, uncond: Tensor | None, teacher_cond: Tensor, teacher_anchor: Tensor, teacher_uncond: Tensor | None,
    numbers: Sequence[float], tables: Sequence[Tensor | None], uncond_weight: float, prediction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `guided_noise_loss_reference`; on a GPU one launch."""
    given = GuidedLossOperands(
        cond, uncond, teacher_cond, teacher_anchor, teacher_uncond, numbers, tables, uncond_weight, prediction
    )
    on_gpu = cond.numel() and backend.runs_triton([*given.predictions, *tables])
    return (_launch if on_gpu else guided_noise_loss_reference)(given)


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
    return grad_cond.to(ctx.dtype), grad_uncond, None, None, None, None, ctx.tables, None, None


guided_noise_loss_op.register_autograd(_backward, setup_context=_save)
