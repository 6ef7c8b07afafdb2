"""The guided-noise loss of KSCU and ESD: negative guidance as a regression target, weighted per sample.

With D = e(x, t, c) - e(x, t, a), the frozen model's direction from the anchor `a` to the concept `c`:

    y_c    = e(x, t, a) - g D                                           conditional target
    y_0    = e(x, t, 0) - lambda1 D                                     unconditional target
    loss_b = mean((s(x, t, c) - y_c)^2) + lambda2 mean((s(x, t, 0) - y_0)^2)
    loss   = 1/B sum_b w_b loss_b

where s is the model in training and w_b the key-step weight of sample b. The published rule has a = 0, the empty
prompt. Without the unconditional branch this is ESD's loss. Which prompts, timesteps and weights is the
trainer's business.

Usage: `loss, loss_B = guided_noise_loss(s_c, s_0, e_c, e_a, e_0, guidance=1.0, lambda1_B=..., uncond_weight=1e-4)`
"""

from __future__ import annotations

from torch import Tensor

from fastunlearn_kernels.precision import Coefficient, compute_dtype, per_sample


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
) -> tuple[Tensor, Tensor]:
    """The loss and its per-sample parts.

    Args:
        cond, uncond: student predictions for the concept and the empty prompt, (B, C, H, W), any float dtype.
            `uncond=None` switches the unconditional branch off; then `teacher_uncond` may be None too.
        teacher_cond, teacher_anchor, teacher_uncond: frozen predictions of the same shape; no gradient reaches them.
        guidance: g. lambda1_B: lambda1, one number or one per sample. uncond_weight: lambda2.
        weight_B: key-step weight, one number or one per sample. A sample of weight 0 has no influence on the loss and
            on any gradient, even if its values are not finite.

    Returns:
        loss: scalar, fp32 (fp64 if an input is fp64). per_sample_B: loss_b without w_b, detached; 0 where w_b is 0.

    Raises:
        ValueError: shapes differ, or `uncond` comes without `teacher_uncond`.
    """
    teachers = {"teacher_cond": teacher_cond, "teacher_anchor": teacher_anchor, "teacher_uncond": teacher_uncond}
    _check_shapes(cond, uncond=uncond, **teachers)
    dtype = compute_dtype(cond, uncond, teacher_cond, teacher_anchor, teacher_uncond)
    weight = per_sample(weight_B, cond, dtype)
    anchor = teacher_anchor.detach().to(dtype)
    direction = teacher_cond.detach().to(dtype) - anchor

    target = anchor - per_sample(guidance, cond, dtype) * direction
    loss_B = _mean_square_B(cond.to(dtype) - target, weight)
    if uncond is not None:
        if teacher_uncond is None:
            raise ValueError("uncond needs teacher_uncond: without it there is no target for the unconditional branch")
        target = teacher_uncond.detach().to(dtype) - per_sample(lambda1_B, cond, dtype) * direction
        loss_B = loss_B + uncond_weight * _mean_square_B(uncond.to(dtype) - target, weight)

    loss = (weight.flatten() * loss_B).sum() / cond.shape[0]
    return loss, loss_B.detach()


def _mean_square_B(residual: Tensor, weight: Tensor) -> Tensor:
    """mean(residual^2) of each sample, (B,). Masked before squaring, so that 0 * NaN arises in no pass."""
    return residual.masked_fill(weight == 0, 0.0).square().flatten(1).mean(1)


def _check_shapes(cond: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != cond.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, cond has {tuple(cond.shape)}")
    if cond.dim() < 2 or cond.shape[0] == 0:
        raise ValueError(f"cond must be (B, C, H, W) with B >= 1, got shape {tuple(cond.shape)}")
