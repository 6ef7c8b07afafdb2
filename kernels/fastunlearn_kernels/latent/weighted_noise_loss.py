"""Squared error of noise predictions over several sample sets, each with a signed weight: retain and meta losses.

With s(b) the set of sample b, n_s the size of set s and t_b the target of the prediction p_b:

    mean_s = 1/n_s sum_{b: s(b) = s} mean((p_b - t_b)^2)
    loss   = sum_s w_s mean_s,      dloss/dp_b = 2 w_s (p_b - t_b) / (n_s N)

    t = n (epsilon), sqrt(A) n - sqrt(1 - A) x0 (v_prediction), x0 (sample),     A = alpha-bar

One batch may hold what is to be kept, what is to be unlearned (negative weight) and fillers that belong to no set: one
forward and one backward of the model serve all of them. Not here: which samples form a set, and with which weight.

One launch: every program writes its part of the sum and draws a ticket, the one with the last ticket adds the parts in
a fixed order in fp64. The gradient comes out of the same pass.

Usage: `loss, mean_S, found_inf = weighted_noise_loss(prediction, None, set_B, weight_S, seed_B=seeds)`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common import backend, scratch
from fastunlearn_kernels.common.noise import check_seeds, gaussian
from fastunlearn_kernels.common.precision import check_shapes, compute_dtype
from fastunlearn_kernels.latent.coefficients import Coefficient, broadcast, coefficients, kernel_arguments, no_gradient
from fastunlearn_kernels.latent.prediction import prediction_number, training_target, training_target_tile
from fastunlearn_kernels.testing.spec import LAYOUTS, SHORT, AotKernel, Case, Inputs, OpSpec, Outputs, nbytes, normal

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
    seed_B: Tensor | None = None,
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
        seed_B: (B,) int64 instead of `target_noise`: the noise that `add_noise` made from the same seeds.
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
    if kind != 2 and (target_noise is None) == (seed_B is None):
        raise ValueError("exactly one of target_noise and seed_B must be given")
    if (kind != 0 and x0 is None) or (kind == 1 and alpha_t is None):
        raise ValueError(f"prediction_type {prediction_type!r} needs x0{' and alpha_t' if kind == 1 else ''}")
    check_seeds(seed_B, len(prediction))
    given = coefficients(prediction, alpha_t=1.0 if kind != 1 or alpha_t is None else alpha_t)
    (noise, seed_B), x0 = (None, None) if kind == 2 else (target_noise, seed_B), None if kind == 0 else x0
    weights = weight_S.detach().to(compute_dtype(prediction, noise, x0))
    out = weighted_noise_loss_op(prediction, noise, x0, set_B, weights, seed_B, given.numbers, given.tables, kind)
    return WeightedLoss(*out[:3])


def weighted_noise_loss_reference(
    prediction: Tensor, noise: Tensor | None, x0: Tensor | None, set_B: Tensor, weight_S: Tensor,
    seed_B: Tensor | None, numbers: Sequence[float], tables: Sequence[Tensor | None], kind: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, mean_S, found_inf, dloss/dprediction) in plain PyTorch; arguments as the registered op's."""
    dtype = compute_dtype(prediction, noise, x0)
    if seed_B is not None:
        noise = gaussian(seed_B, tuple(prediction.shape), dtype)
    (alpha,) = broadcast(numbers, tables, prediction, dtype)
    wide_noise, wide_x0 = (None if t is None else t.to(dtype) for t in (noise, x0))
    target = training_target(wide_noise, wide_x0, alpha, kind)
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
    prediction_ptr, noise_ptr, x0_ptr, set_ptr, weight_ptr, seed_ptr, alpha,
    grad_ptr, partial_ptr, ticket_ptr, loss_ptr, mean_S_ptr, found_inf_ptr, n, sets,
    KIND_A: tl.constexpr, PREDICTION: tl.constexpr, HAS_NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
        target = training_target_tile(
            noise_ptr, x0_ptr, seed_ptr, alpha, i_b, o_n, o, mask, KIND_A, PREDICTION, HAS_NOISE
        )
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
def _count(set_ptr, i_set, batch):
    """How many samples belong to a set."""
    hits = tl.zeros([LANES], tl.int32)
    for first in range(0, batch, LANES):
        o_b = first + tl.arange(0, LANES)
        hits += (tl.load(set_ptr + o_b, mask=o_b < batch, other=-1) == i_set).to(tl.int32)
    return tl.sum(hits)


@triton.jit
def _sum_up(set_ptr, weight_ptr, partial_ptr, loss_ptr, mean_S_ptr, found_inf_ptr, n, sets, chunks, batch):
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


def _launch(
    prediction: Tensor, noise: Tensor | None, x0: Tensor | None, set_B: Tensor, weight_S: Tensor,
    seed_B: Tensor | None, numbers: Sequence[float], tables: Sequence[Tensor | None], kind: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    device, batch, n, sets = prediction.device, len(prediction), prediction[0].numel(), len(weight_S)
    ins = [None if t is None else t.contiguous() for t in (prediction, noise, x0, set_B, weight_S, seed_B)]
    chunks = triton.cdiv(n, BLOCK)
    grad = scratch.empty(prediction.shape, compute_dtype(prediction), device)
    shapes: tuple[tuple[int, ...], ...] = ((batch * chunks,), (), (sets,), ())
    partial, loss, mean_S, found_inf = (scratch.empty(shape, torch.float32, device) for shape in shapes)
    (alpha,), (kind_a,) = kernel_arguments(numbers, tables)
    with backend.on_device(prediction):
        weighted_noise_loss_kernel[(chunks, batch)](
            *ins, alpha, grad, partial, scratch.ticket(device), loss, mean_S, found_inf, n, sets,
            KIND_A=kind_a, PREDICTION=kind, HAS_NOISE=noise is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return loss, mean_S, found_inf, grad


@torch.library.custom_op("fastunlearn::weighted_noise_loss", mutates_args=())
def weighted_noise_loss_op(
    prediction: Tensor, noise: Tensor | None, x0: Tensor | None, set_B: Tensor, weight_S: Tensor,
    seed_B: Tensor | None, numbers: Sequence[float], tables: Sequence[Tensor | None], kind: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `weighted_noise_loss_reference`; on a GPU one launch. `numbers` and `tables` hold alpha-bar."""
    tensors = (prediction, noise, x0, set_B, weight_S, seed_B)
    run = _launch if prediction.numel() and backend.runs_triton([*tensors, *tables]) else weighted_noise_loss_reference
    return run(*tensors, numbers, tables, kind)


@weighted_noise_loss_op.register_fake
def _fake(prediction, noise, x0, set_B, weight_S, seed_B, numbers, tables, kind):
    wide = prediction.new_empty(weight_S.shape, dtype=compute_dtype(prediction, noise, x0))
    grad = prediction.new_empty(prediction.shape, dtype=compute_dtype(prediction))
    return wide.new_empty(()), wide, prediction.new_empty((), dtype=torch.float32), grad


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype, ctx.of_tables = inputs[0].dtype, no_gradient(inputs[7])


def _backward(ctx, grad_loss, *_):
    return (grad_loss * ctx.saved_tensors[0]).to(ctx.dtype), *[None] * 6, ctx.of_tables, None


weighted_noise_loss_op.register_autograd(_backward, setup_context=_save)


def _run(inputs: Inputs) -> Outputs:
    return weighted_noise_loss(**inputs)._asdict()


def _eager(inputs: Inputs) -> Outputs:
    """As one writes it: in the dtype of the prediction, mse_loss set by set."""
    prediction, weight_S, noise = inputs["prediction"], inputs["weight_S"], inputs["target_noise"]
    if "seed_B" in inputs:
        noise = gaussian(inputs["seed_B"], tuple(prediction.shape), prediction.dtype)
    alpha = torch.as_tensor(inputs.get("alpha_t", 1.0), dtype=prediction.dtype, device=prediction.device)
    kind = prediction_number(inputs.get("prediction_type", "epsilon"))
    target = training_target(noise, inputs.get("x0"), alpha.reshape(-1, *[1] * (prediction.dim() - 1)), kind)
    means = [prediction[:0].sum()] * len(weight_S)
    for i_set, w in enumerate(weight_S):
        rows = inputs["set_B"] == i_set
        if rows.any() and w != 0:
            means[i_set] = torch.nn.functional.mse_loss(prediction[rows], target[rows])
    loss = sum((w * mean for w, mean in zip(weight_S, means)), prediction[:0].sum())
    return {"loss": loss, "mean_S": torch.stack(means).detach() if means else weight_S}


def _bytes_moved(inputs: Inputs) -> int:
    prediction, set_B, weight_S = inputs["prediction"], inputs["set_B"], inputs["weight_S"]
    read = sum(0 <= s < len(weight_S) and bool(weight_S[s] != 0) for s in set_B.tolist())
    kind = prediction_number(inputs.get("prediction_type", "epsilon"))
    latents = nbytes(prediction, inputs["target_noise"] if kind != 2 else None, inputs.get("x0") if kind != 0 else None)
    written = prediction.numel() * compute_dtype(prediction).itemsize
    return latents * read // max(len(set_B), 1) + written + nbytes(set_B, weight_S, inputs.get("seed_B"))


def _inputs(
    shape: Sequence[int], layout: str = "plain", seeds: bool = False, kind: str = "epsilon", scale: float = 1.0,
    sets: Sequence[int] = (), weights: Sequence[float] = (1.0, -0.5, 2.0), **options: Any,
):  # fmt: skip
    """A factory of inputs: sample b belongs to set `sets[b]`, without `sets` to b modulo their number."""

    def make(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        names = ["prediction"] + (["target_noise"] if not seeds and kind != "sample" else [])
        names += ["x0"] if kind != "epsilon" else []
        tensors: Inputs = {"target_noise": None} | {n: normal(draw, shape, dtype, device, layout, scale) for n in names}
        if seeds:
            tensors["seed_B"] = torch.randint(-(2**63), 2**63 - 1, (shape[0],), generator=draw).to(device)
        set_B = torch.tensor(sets, dtype=torch.int64) if sets else torch.arange(shape[0]) % max(len(weights), 1)
        tensors |= {"set_B": set_B.to(device), "weight_S": torch.tensor(weights, device=device)}
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in options.items()}
        return tensors | {"prediction_type": kind} | moved

    return make


def _masked(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Samples 1, 2 and 4 belong to a set of weight 0 or to none, and hold nothing but NaN and Inf. Set 3 is empty."""
    inputs = _inputs((5, 4, 8, 8), sets=(2, 1, -1, 0, 4), weights=(-0.7, 0.0, 1.5, 3.0))(draw, dtype, device)
    for name in ("prediction", "target_noise"):
        inputs[name][[1, 2, 4]] = float("nan")
        inputs[name][[1, 2, 4], 0] = float("inf")
    return inputs


def _broken(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
    prediction = normal(draw, (3, 4, 8, 8), dtype, device).index_fill(3, torch.tensor([7], device=device), float("nan"))
    return _inputs((3, 4, 8, 8))(draw, dtype, device) | {"prediction": prediction}


def _kernel(name: str, dtype: str, **options: object) -> AotKernel:
    constants = {"KIND_A": 0, "PREDICTION": 0, "HAS_NOISE": True, "BLOCK": BLOCK} | options
    signature = {name: f"*{dtype}" for name in ("prediction_ptr", "noise_ptr", "x0_ptr")}
    signature |= {f"{name}_ptr": "*fp32" for name in ("weight", "grad", "partial", "loss", "mean_S", "found_inf")}
    signature |= {"set_ptr": "*i64", "seed_ptr": "*i64", "alpha": "*fp32" if constants["KIND_A"] else "fp32"}
    signature |= {"ticket_ptr": "*i32", "n": "i32", "sets": "i32"} | {name: "constexpr" for name in constants}
    aligned = ("prediction_ptr", "noise_ptr", "x0_ptr", "grad_ptr", "n")
    limits: dict[str, Any] = {"max_registers": 48 if constants["HAS_NOISE"] else 64, "elements": BLOCK}
    return AotKernel(name, weighted_noise_loss_kernel, signature, constants, aligned, **limits)


SPEC = OpSpec(
    name="weighted_noise_loss",
    run=_run,
    eager=_eager,
    cases=(
        Case("0 elements", _inputs((0, 4, 8, 8))),
        Case("0 sets", _inputs((2, 4, 8, 8), weights=())),
        Case("1 element", _inputs((1, 1, 1, 1))),
        Case("63 elements", _inputs((3, 1, 7, 9))),
        Case("1000 elements", _inputs((2, 1000))),
        Case("several chunks", _inputs((4, 4, 33, 31))),
        Case("more samples than lanes", _inputs((259, 1)), (torch.float32,)),
        *[Case(layout, _inputs((2, 4, 8, 10), layout)) for layout in LAYOUTS[1:]],
        Case("masked samples", _masked),
        Case("NaN in a sample that counts", _broken),
        Case("v prediction", _inputs((3, 4, 8, 8), kind="v_prediction", alpha_t=torch.tensor([0.1, 0.9, 0.5]))),
        Case("v prediction, seeds", _inputs((2, 4, 8, 8), seeds=True, kind="v_prediction", alpha_t=0.3)),
        Case("x0 prediction", _inputs((2, 4, 8, 8), kind="sample")),
        Case("seeds, several chunks", _inputs((2, 4, 33, 31), seeds=True)),
        Case("large values", _inputs((2, 4, 8, 8), scale=1e4), (torch.float32, torch.bfloat16)),
    ),
    gradients=("prediction",),
    of_gradient="loss",
    bytes_moved=_bytes_moved,
    launches=1,
    latent=True,
    kernels=(
        *[_kernel(dtype, dtype) for dtype in SHORT.values()],
        *[_kernel(f"{dtype} seeds", dtype, HAS_NOISE=False) for dtype in SHORT.values()],
        _kernel("bf16 v prediction, seeds", "bf16", HAS_NOISE=False, PREDICTION=1, KIND_A=2),
        _kernel("bf16 x0 prediction", "bf16", PREDICTION=2),
    ),
    bench=lambda numel, dtype, device: _inputs((4, 4, numel // 16))(torch.Generator().manual_seed(0), dtype, device),
)
