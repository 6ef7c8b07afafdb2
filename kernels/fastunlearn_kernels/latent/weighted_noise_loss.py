"""Squared error of noise predictions over several sample sets, each with a signed weight: retain and meta losses.

With s(b) the set of sample b, n_s the size of set s and t_b the target of the prediction p_b:

    mean_s = 1/n_s sum_{b: s(b) = s} mean((p_b - t_b)^2)
    loss   = sum_s w_s mean_s,      dloss/dp_b = 2 w_s (p_b - t_b) / (n_s N)

    t = n (epsilon), sqrt(A) n - sqrt(1 - A) x0 (v_prediction), x0 (sample),     A = alpha-bar

One batch may hold what is to be kept, what is to be unlearned (negative weight) and fillers that belong to no set: one
forward and one backward of the model serve all of them. Which samples form a set, and with which weight, the caller
decides.

One launch: every program writes its part of the sum and draws a ticket, the one with the last ticket adds the parts in
a fixed order in fp64. The gradient comes out of the same pass.

Usage: `loss, mean_S, found_inf = weighted_noise_loss(prediction, noise, set_B, weight_S)`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common import backend, scratch
from fastunlearn_kernels.common.precision import check_shapes, compute_dtype
from fastunlearn_kernels.latent.coefficients import Coefficient, broadcast, coefficients, kernel_arguments, no_gradient
from fastunlearn_kernels.latent.prediction import prediction_number, training_target, training_target_tile

BLOCK = 1024
LANES = tl.constexpr(256)  # of the sums over samples and parts: few, so that these need no more registers than the rest


class WeightedLoss(NamedTuple):
    """loss: scalar fp32 (fp64 if an input is), with graph. mean_S: mean_s without w_s, detached; 0 for an empty set and
    where w_s is 0. found_inf: fp32 scalar on the device, 1 if the loss is not finite, else 0 (as in torch.amp)."""

    loss: Tensor
    mean_S: Tensor
    found_inf: Tensor


def weighted_noise_loss(
    prediction: Tensor,
    target_noise: Tensor | None,
    set_B: Tensor,
    weight_S: Tensor,
    *,
    x0: Tensor | None = None,
    alpha_t: Coefficient | None = None,
    prediction_type: str = "epsilon",
) -> WeightedLoss:
    """The loss, the mean of each set and a flag; the gradient reaches `prediction`, once (no double backward).

    Args:
        prediction, target_noise, x0: (B, C, H, W), any float dtype. What the target does not need may be None.
        set_B: (B,) integer: which set each sample belongs to. A sample with a number outside 0..S-1, or in a set of
            weight 0, is not read: it has no influence on anything, even if its values are not finite.
        weight_S: (S,) fp32 or fp64, of either sign. Both on the device; changing them costs no compilation and no wait.
        alpha_t: alpha-bar, one number or one per sample: for v_prediction.

    Raises:
        ValueError: shapes or dtypes do not fit, the prediction type is unknown, or its target lacks an ingredient.
    """
    kind = prediction_number(prediction_type)
    check_shapes("prediction", prediction, target_noise=target_noise, x0=x0)
    if set_B.is_floating_point() or set_B.shape != prediction.shape[:1]:
        raise ValueError(f"set_B must hold {len(prediction)} integers, got {set_B.dtype} of {tuple(set_B.shape)}")
    if weight_S.dim() != 1 or weight_S.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weight_S must be (S,) float32 or float64, got {weight_S.dtype} of {tuple(weight_S.shape)}")
    if kind != 2 and target_noise is None:
        raise ValueError(f"prediction_type {prediction_type!r} needs target_noise")
    if (kind != 0 and x0 is None) or (kind == 1 and alpha_t is None):
        raise ValueError(f"prediction_type {prediction_type!r} needs x0{' and alpha_t' if kind == 1 else ''}")
    given = coefficients(prediction, alpha_t=1.0 if kind != 1 or alpha_t is None else alpha_t)
    noise, x0 = None if kind == 2 else target_noise, None if kind == 0 else x0
    weights = weight_S.detach().to(compute_dtype(prediction, noise, x0))
    out = weighted_noise_loss_op(prediction, noise, x0, set_B, weights, given.numbers, given.tables, kind)
    return WeightedLoss(*out[:3])


class WeightedLossOperands(NamedTuple):
    """The arguments of the registered op."""

    prediction: Tensor  # (B, ...)
    noise: Tensor | None  # its shape; None for sample
    x0: Tensor | None  # its shape; None for epsilon
    set_B: Tensor  # integers
    weight_S: Tensor  # in the dtype of the computation
    numbers: Sequence[float]  # alpha-bar, where it is a number ...
    tables: Sequence[Tensor | None]  # ... and where it is a tensor of 1 or B elements
    kind: int  # place in PREDICTION_TYPES


def weighted_noise_loss_reference(given: WeightedLossOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, mean_S, found_inf, dloss/dprediction) in plain PyTorch."""
    prediction, set_B, weight_S = given.prediction, given.set_B, given.weight_S
    dtype = compute_dtype(prediction, given.noise, given.x0)
    (alpha,) = broadcast(given.numbers, given.tables, prediction, dtype)
    wide_noise, wide_x0 = (None if t is None else t.to(dtype) for t in (given.noise, given.x0))
    target = training_target(wide_noise, wide_x0, alpha, given.kind)
    member_BS = set_B.unsqueeze(1) == torch.arange(len(weight_S), device=set_B.device)
    count_S = member_BS.sum(0).clamp(min=1)
    factor_B, skipped_B = torch.where(member_BS, weight_S / count_S, 0).sum(1), ~(member_BS & (weight_S != 0)).any(1)
    factor, skipped = (t.reshape(-1, *[1] * (prediction.dim() - 1)) for t in (factor_B, skipped_B))
    # Masked before the error is taken, so that 0 * NaN arises in no pass.
    residual = (prediction.to(dtype) - target).masked_fill(skipped, 0.0)
    elements = max(math.prod(prediction.shape[1:]), 1)
    mean_B = residual.square().flatten(1).sum(1) / elements
    mean_S = torch.where(member_BS, mean_B.unsqueeze(1), 0.0).sum(0) / count_S
    loss = (weight_S * mean_S).sum()
    found_inf = (~loss.detach().isfinite()).to(torch.float32)
    gradient = (2 / elements * factor * residual).to(compute_dtype(prediction)).contiguous()
    return loss, mean_S.detach(), found_inf, gradient


@triton.jit
def weighted_noise_loss_kernel(
    prediction_ptr,  # the model's predictions, (B, n)
    noise_ptr,  # noise of the targets, (B, n); not read for sample
    x0_ptr,  # clean latents of the targets, (B, n); not read for epsilon
    set_ptr,  # set of each sample, integers, (B,)
    weight_ptr,  # weight of each set, fp32, (sets,)
    alpha,  # alpha-bar, a number or a pointer, see `coefficient`
    grad_ptr,  # dloss/dprediction, fp32, (B, n), written
    partial_ptr,  # each program's part of the sum, fp32, (B, chunks), written
    ticket_ptr,  # int32, (1,), 0 before and after
    loss_ptr,  # fp32, (1,), written by the last program
    mean_S_ptr,  # mean of each set, fp32, (sets,), written by the last program
    found_inf_ptr,  # fp32, (1,), written by the last program
    n,  # elements of a sample
    sets,  # number of sets
    KIND_A: tl.constexpr,  # kind of alpha
    PREDICTION: tl.constexpr,  # place in PREDICTION_TYPES
    BLOCK: tl.constexpr,  # elements of a program
):
    """Program (chunk, sample): residuals and gradient of BLOCK elements; the last program of all sums the losses."""
    i_chunk, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunks, batch = tl.num_programs(0), tl.num_programs(1)
    o_n = i_chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < n
    o = i_b * n + o_n
    i_set = tl.load(set_ptr + i_b)
    w = tl.load(weight_ptr + i_set, mask=(i_set >= 0) & (i_set < sets), other=0.0)
    gradient = tl.zeros([BLOCK], tl.float32)
    total = 0.0
    if w != 0:
        target = training_target_tile(noise_ptr, x0_ptr, alpha, i_b, o, mask, KIND_A, PREDICTION)
        residual = tl.load(prediction_ptr + o, mask=mask, other=0.0).to(tl.float32) - target
        residual = tl.where(mask, residual, 0.0)
        count = _count(set_ptr, i_set, batch)
        # 1.0 * n, since n = 1 is a constant, which has no methods.
        gradient = 2.0 * w / (count.to(tl.float32) * (1.0 * n)) * residual
        total = tl.sum(residual * residual)
    tl.store(grad_ptr + o, gradient.to(grad_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + i_b * chunks + i_chunk, total)
    tl.debug_barrier()  # the part is written before the ticket is drawn
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == chunks * batch - 1:
        _sum_up(set_ptr, weight_ptr, partial_ptr, loss_ptr, mean_S_ptr, found_inf_ptr, n, sets, chunks, batch)
        tl.store(ticket_ptr, 0)


@triton.jit
def _count(
    set_ptr,  # as above
    i_set,  # which set
    batch,  # number of samples
):
    """How many samples belong to a set."""
    hits = tl.zeros([LANES], tl.int32)
    for first in range(0, batch, LANES):
        o_b = first + tl.arange(0, LANES)
        hits += (tl.load(set_ptr + o_b, mask=o_b < batch, other=-1) == i_set).to(tl.int32)
    return tl.sum(hits)


@triton.jit
def _sum_up(
    set_ptr, weight_ptr, partial_ptr, loss_ptr, mean_S_ptr, found_inf_ptr, n, sets,  # as above
    chunks,  # programs of a sample
    batch,  # number of samples
):  # fmt: skip
    """The means of the sets, the loss and the flag, from the parts of all programs."""
    loss = tl.zeros([], tl.float64)
    for i_set in range(sets):
        w = tl.load(weight_ptr + i_set)
        mean = tl.zeros([], tl.float64)
        if w != 0:
            parts = tl.zeros([LANES], tl.float64)
            for first in range(0, batch * chunks, LANES):
                o_p = first + tl.arange(0, LANES)
                inside = o_p < batch * chunks
                mine = inside & (tl.load(set_ptr + o_p // chunks, mask=inside, other=-1) == i_set)
                parts += tl.load(partial_ptr + o_p, mask=mine, other=0.0, cache_modifier=".cg").to(tl.float64)
            mean = tl.sum(parts) / (tl.maximum(_count(set_ptr, i_set, batch), 1).to(tl.float64) * n)
            loss += w * mean
        tl.store(mean_S_ptr + i_set, mean.to(tl.float32))
    total = loss.to(tl.float32)
    tl.store(loss_ptr, total)
    tl.store(found_inf_ptr, tl.where(total - total == 0, 0.0, 1.0))


def _launch(given: WeightedLossOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    prediction, sets = given.prediction, len(given.weight_S)
    device, batch, n = prediction.device, len(prediction), prediction[0].numel()
    ins = [None if t is None else t.contiguous() for t in given[:5]]
    chunks = triton.cdiv(n, BLOCK)
    grad = scratch.empty(prediction.shape, compute_dtype(prediction), device)
    shapes: tuple[tuple[int, ...], ...] = ((batch * chunks,), (), (sets,), ())
    partial, loss, mean_S, found_inf = (scratch.empty(shape, torch.float32, device) for shape in shapes)
    (alpha,), (kind_a,) = kernel_arguments(given.numbers, given.tables)
    with backend.on_device(prediction):
        weighted_noise_loss_kernel[(chunks, batch)](
            *ins, alpha, grad, partial, scratch.ticket(device), loss, mean_S, found_inf, n, sets,
            KIND_A=kind_a, PREDICTION=given.kind, BLOCK=BLOCK,
        )  # fmt: skip
    return loss, mean_S, found_inf, grad


@torch.library.custom_op("fastunlearn::weighted_noise_loss", mutates_args=())
def weighted_noise_loss_op(
    prediction: Tensor, noise: Tensor | None, x0: Tensor | None, set_B: Tensor, weight_S: Tensor,
    numbers: Sequence[float], tables: Sequence[Tensor | None], kind: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `weighted_noise_loss_reference`; on a GPU one launch."""
    given = WeightedLossOperands(prediction, noise, x0, set_B, weight_S, numbers, tables, kind)
    on_gpu = prediction.numel() and backend.runs_triton([*given[:5], *tables])
    return (_launch if on_gpu else weighted_noise_loss_reference)(given)


@weighted_noise_loss_op.register_fake
def _fake(prediction, noise, x0, set_B, weight_S, numbers, tables, kind):
    wide = prediction.new_empty(weight_S.shape, dtype=compute_dtype(prediction, noise, x0))
    grad = prediction.new_empty(prediction.shape, dtype=compute_dtype(prediction))
    return wide.new_empty(()), wide, prediction.new_empty((), dtype=torch.float32), grad


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype, ctx.of_tables = inputs[0].dtype, no_gradient(inputs[6])


def _backward(ctx, grad_loss, *_):
    return (grad_loss * ctx.saved_tensors[0]).to(ctx.dtype), *[None] * 5, ctx.of_tables, None


weighted_noise_loss_op.register_autograd(_backward, setup_context=_save)
