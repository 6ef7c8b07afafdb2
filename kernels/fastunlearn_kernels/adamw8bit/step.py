"""AdamW with moments in 8 bits, with gradient surgery and clipping on the way: one pass over everything it needs.

With u the gradient, r the retain gradient, coef and scale from `surgery_coefficients` (without a plan g = u):

    g = (u - coef r) scale
    m <- beta1 m + (1 - beta1) g                          v <- beta2 v + (1 - beta2) g^2
    p <- p (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

in fp32, with the new m and v as they are before they are quantised. Moments are bitsandbytes' (`dynamic_code`): uint8
codes and one fp32 absmax for each 256 elements of a tensor in logical order, m in the signed map, v in the unsigned
one; or fp32, for small tensors. In a block where m or v is not finite both absmax become NaN.

Parameters are fp32 (or any float, rounded to nearest), optionally with low-precision `copies` written in the same pass;
or bf16 with stochastic rounding and no fp32 master. A plan with found_inf = 1 leaves every bit as it is; the host does
not learn of it, so `step` counts that call as well.

Bytes an element, each operand touched once: bf16 p and u: 10 (p 4, u 2, m 2, v 2), and 2 or 1 for a bf16 or int8 r,
which is not read where coef is 0; fp32 p and bf16 u with a bf16 copy: 16, and as much for r. Tensors that are not
contiguous are copied there and back. Which tensors, in what state layout, is `optimizer`'s business.

Usage: `adamw8bit_step(params, grads, state1, state2, absmax1, absmax2, step=1, lr=1e-4)`
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastunlearn_kernels.adamw8bit.kernel import adamw8bit_step_chunk_kernel
from fastunlearn_kernels.adamw8bit.reference import AdamW8bitOperands, adamw8bit_step_reference
from fastunlearn_kernels.common import backend
from fastunlearn_kernels.common.tensor_lists import addresses
from fastunlearn_kernels.common.tiles import QUANT_BLOCK, TYPES
from fastunlearn_kernels.gradients.operands import (
    Retain,
    check_blocks,
    check_floats,
    check_lists,
    cut_tensors,
    unpacked,
)
from fastunlearn_kernels.gradients.segments import Segments, whole
from fastunlearn_kernels.gradients.surgery_coefficients import SurgeryPlan
from fastunlearn_kernels.quantize.block_chunks import block_chunks_of_pieces
from fastunlearn_kernels.quantize.dynamic_code import dynamic_map

# 16 elements a thread: fewer take more instructions an element, since a row is then reduced over more lanes.
ROWS = 8


def adamw8bit_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor] = (),
    absmax2: Sequence[Tensor] = (),
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    copies: Sequence[Tensor] = (),
    retain: Retain = None,
    plan: SurgeryPlan | None = None,
    segments: Segments | None = None,
    stochastic_rounding: bool | None = None,
    seed: int = 0,
) -> None:
    """One step, in place on params, copies, state1, state2, absmax1 and absmax2; one launch.

    Args:
        params, grads: each list of one float dtype. `grads` are read only.
        state1, state2: m and v, uint8 with absmax1 and absmax2, or fp32 without.
        step: t, from 1 on.
        copies: tensors of another float dtype that receive the new parameters too, or none.
        plan, retain, segments: from the surgery ops. Without `retain` the plan only clips; elements in no piece of
            `segments` (default: everything is one segment) keep their gradient as it is. No plan: no surgery.
        stochastic_rounding: of bf16 parameters, default True for those; bits from `seed` and the place in the list.
            Take another seed each step.

    Raises:
        ValueError: lists that do not pair up, dtypes that do not go together, step < 1, `retain` without `plan`.
    """
    codes, scales = unpacked(retain)
    if not params:
        return
    if plan is None and codes:
        raise ValueError("retain without a plan has no effect: hand in surgery_coefficients(...) too")
    segments = whole(params) if segments is None else segments
    stochastic = params[0].dtype == torch.bfloat16 if stochastic_rounding is None else stochastic_rounding
    lists = {"copies": copies, "grads": grads, "retain": codes, "state1": state1, "state2": state2}
    _check(params, lists, scales, absmax1, absmax2, segments, plan, stochastic, step)
    decay = 1 - lr * weight_decay
    step_size, inv_sqrt_bias2 = lr / (1 - betas[0] ** step), 1 / math.sqrt(1 - betas[1] ** step)
    adamw8bit_step_op(
        list(params), list(copies), list(grads), codes, scales,
        list(state1), list(state2), list(absmax1), list(absmax2),
        None if plan is None else plan.coef_S, None if plan is None else plan.scale,
        None if plan is None else plan.found_inf, segments.flat() if plan is not None else [],
        betas[0], betas[1], eps, decay, step_size, inv_sqrt_bias2, stochastic, seed,
    )  # fmt: skip


def _check(
    params: Sequence[Tensor], lists: dict[str, Sequence[Tensor]], retain_absmax: Sequence[Tensor],
    absmax1: Sequence[Tensor], absmax2: Sequence[Tensor], segments: Segments, plan: SurgeryPlan | None,
    stochastic: bool, step: int,
) -> None:  # fmt: skip
    check_lists(params, **lists)
    cut_tensors(params, segments.flat(), segments.count)
    for name in ("grads", "state1", "state2"):
        if len(lists[name]) != len(params):
            raise ValueError(f"{name} has {len(lists[name])} tensors for {len(params)} parameters")
    check_floats("params", params)
    check_floats("grads", lists["grads"])
    check_floats("copies", lists["copies"])
    state1, state2 = lists["state1"], lists["state2"]
    if absmax1 or absmax2:
        check_floats("state1", state1, torch.uint8)
        check_floats("state2", state2, torch.uint8)
        check_blocks("state1", state1, absmax1)
        check_blocks("state2", state2, absmax2)
    else:
        check_floats("state1", state1, torch.float32, torch.float64)
        check_floats("state2", state2, torch.float32, torch.float64)
    if retain_absmax:
        check_floats("retain codes", lists["retain"], torch.int8)
        check_blocks("retain", lists["retain"], retain_absmax)
    else:
        check_floats("retain", lists["retain"])
    if plan is not None and plan.coef_S.shape != (segments.count,):
        raise ValueError(f"the plan has {tuple(plan.coef_S.shape)} coefficients for {segments.count} segments")
    if stochastic and params[0].dtype not in (torch.bfloat16, torch.float64):
        raise ValueError(f"stochastic rounding is for bfloat16 parameters, got {params[0].dtype}")
    if step < 1:
        raise ValueError(f"steps count from 1, got {step}")


def _launch(given: AdamW8bitOperands) -> None:
    params, device = given.params, given.params[0].device
    chunks, pieces = block_chunks_of_pieces(tuple(t.numel() for t in params), tuple(given.pieces), device)
    if not len(chunks):
        return
    ordered = [[t.contiguous() for t in tensors] for tensors in given.lists]
    p, c, u, r, _, m, _, _, _ = ordered
    types = [TYPES[tensors[0].dtype] if tensors else None for tensors in (p, c, u, r, m)]
    maps = dynamic_map(True, device), dynamic_map(False, device)
    coef = None if given.coef_S is None else given.coef_S.contiguous()
    # 1 - beta is better known here than in fp32.
    betas = given.beta1, 1 - given.beta1, given.beta2, 1 - given.beta2
    numbers = *betas, given.eps, given.decay, given.step_size, given.inv_sqrt_bias2, given.seed
    with backend.on_device(params[0]):
        adamw8bit_step_chunk_kernel[(len(chunks),)](
            chunks, pieces, addresses(*ordered), *maps, coef, given.scale, given.found_inf, len(params), *numbers,
            *types, PLAN=coef is not None, STOCHASTIC=given.stochastic, ROWS=ROWS, WIDTH=QUANT_BLOCK, num_warps=4,
        )  # fmt: skip
    for tensors, copied in zip(given.lists, ordered):
        for tensor, copy in zip(tensors, copied):
            if copy is not tensor and not (tensors is given.grads or tensors is given.retain):
                tensor.copy_(copy)


WRITTEN = ("params", "copies", "state1", "state2", "absmax1", "absmax2")


@torch.library.custom_op("fastunlearn::adamw8bit_step", mutates_args=WRITTEN)
def adamw8bit_step_op(
    params: Sequence[Tensor], copies: Sequence[Tensor], grads: Sequence[Tensor], retain: Sequence[Tensor],
    retain_absmax: Sequence[Tensor], state1: Sequence[Tensor], state2: Sequence[Tensor], absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor], coef_S: Tensor | None, scale: Tensor | None, found_inf: Tensor | None,
    pieces: Sequence[int], beta1: float, beta2: float, eps: float, decay: float, step_size: float,
    inv_sqrt_bias2: float, stochastic: bool, seed: int,
) -> None:  # fmt: skip
    """As `adamw8bit_step_reference`; on a GPU one launch."""
    given = AdamW8bitOperands(
        params, copies, grads, retain, retain_absmax, state1, state2, absmax1, absmax2, coef_S, scale, found_inf,
        pieces, beta1, beta2, eps, decay, step_size, inv_sqrt_bias2, stochastic, seed,
    )  # fmt: skip
    tensors = [t for tensors in given.lists for t in tensors] + [coef_S, scale, found_inf]
    (_launch if backend.runs_triton(tensors) else adamw8bit_step_reference)(given)


@adamw8bit_step_op.register_fake
def _fake(*arguments):
    return None
