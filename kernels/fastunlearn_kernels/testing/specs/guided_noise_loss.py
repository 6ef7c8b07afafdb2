"""Cases of `guided_noise_loss`: its inputs, the same loss as one writes it in PyTorch, and the bytes that it moves.

Not the op, and no test: its spec names these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastunlearn_kernels.testing.spec import Inputs, Outputs, nbytes, normal

PREDICTIONS = ("cond", "uncond", "teacher_cond", "teacher_anchor", "teacher_uncond")


def eager(inputs: Inputs) -> Outputs:
    """As one writes it for epsilon and the squared error, in the dtype of the predictions; nothing for the rest."""
    if inputs.keys() & {"prediction_type", "huber_delta"}:
        return {}
    s_c, e_c, e_a = (inputs[name] for name in ("cond", "teacher_cond", "teacher_anchor"))
    guidance, lambda1, weight = (
        torch.as_tensor(inputs[name], dtype=s_c.dtype, device=s_c.device).reshape(-1, *[1] * (s_c.dim() - 1))
        for name in ("guidance", "lambda1_B", "weight_B")
    )
    loss_B = ((s_c - (e_a - guidance * (e_c - e_a))) ** 2).flatten(1).mean(1)
    if inputs["uncond"] is not None:
        residual = inputs["uncond"] - (inputs["teacher_uncond"] - lambda1 * (e_c - e_a))
        loss_B = loss_B + inputs["uncond_weight"] * (residual**2).flatten(1).mean(1)
    return {"loss": (weight.flatten() * loss_B).mean(), "per_sample_B": loss_B.detach()}


def bytes_moved(inputs: Inputs) -> int:
    students, teachers = nbytes(inputs["cond"], inputs["uncond"]), [inputs["teacher_cond"], inputs["teacher_anchor"]]
    if inputs["uncond"] is not None and inputs["teacher_uncond"] is not inputs["teacher_anchor"]:
        teachers.append(inputs["teacher_uncond"])
    gradients = 4 * sum(inputs[name].numel() for name in ("cond", "uncond") if inputs[name] is not None)
    return students + gradients + nbytes(teachers)


def inputs_of(shape: Sequence[int], layout: str = "plain", uncond: bool = True, scale: float = 1.0, **options):
    """A factory of inputs: random predictions, per-sample coefficients, and `options` on top."""

    def make(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        tensors: Inputs = {name: normal(draw, shape, dtype, device, layout, scale) for name in PREDICTIONS}
        if not uncond:
            tensors |= {"uncond": None, "teacher_uncond": None}
        lambda1_B, weight_B = (low + torch.rand(shape[0], generator=draw).to(device) for low in (0.0, 0.5))
        numbers = {"guidance": 1.5, "uncond_weight": 0.3, "lambda1_B": lambda1_B, "weight_B": weight_B}
        given = {name: o.to(device) if isinstance(o, Tensor) else o for name, o in options.items()}
        return tensors | numbers | given

    return make


def masked(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Two of three samples have weight 0; one of them holds nothing but NaN and Inf."""
    inputs = inputs_of((3, 4, 8, 8))(draw, dtype, device)
    for name in PREDICTIONS:
        inputs[name][1] = torch.tensor([float("nan"), float("inf")], device=device).repeat(4)
    return inputs | {"weight_B": torch.tensor([1.5, 0.0, 0.0], device=device)}


def broken(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
    """One NaN where the weight is not 0: loss, that gradient and the flag must say so."""
    inputs = inputs_of((2, 4, 8, 8))(draw, dtype, device)
    inputs["teacher_cond"][1, 2, 3, 4] = float("nan")
    return inputs
