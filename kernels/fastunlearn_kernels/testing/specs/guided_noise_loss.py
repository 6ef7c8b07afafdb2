"""The spec of `guided_noise_loss`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastunlearn_kernels.latent.guided_noise_loss import BLOCK, guided_noise_loss, guided_noise_loss_kernel
from fastunlearn_kernels.testing.common.spec import SHORT, AotKernel, Case, Inputs, OpSpec, Outputs, nbytes, normal

PREDICTIONS = ("cond", "uncond", "teacher_cond", "teacher_anchor", "teacher_uncond")


def _run(inputs: Inputs) -> Outputs:
    return guided_noise_loss(**inputs)._asdict()


def _eager(inputs: Inputs) -> Outputs:
    """As one writes it for epsilon, in the dtype of the predictions; nothing for the rest."""
    if "prediction_type" in inputs:
        return {}
    s_c, e_c, e_a = (inputs[name] for name in ("cond", "teacher_cond", "teacher_anchor"))
    guidance, lambda1 = (
        torch.as_tensor(inputs[name], dtype=s_c.dtype, device=s_c.device).reshape(-1, *[1] * (s_c.dim() - 1))
        for name in ("guidance", "lambda1_B")
    )
    loss_B = ((s_c - (e_a - guidance * (e_c - e_a))) ** 2).flatten(1).mean(1)
    if inputs["uncond"] is not None:
        residual = inputs["uncond"] - (inputs["teacher_uncond"] - lambda1 * (e_c - e_a))
        loss_B = loss_B + inputs["uncond_weight"] * (residual**2).flatten(1).mean(1)
    return {"loss": loss_B.mean(), "per_sample_B": loss_B.detach()}


def _bytes_moved(inputs: Inputs) -> int:
    students, teachers = nbytes(inputs["cond"], inputs["uncond"]), [inputs["teacher_cond"], inputs["teacher_anchor"]]
    if inputs["uncond"] is not None and inputs["teacher_uncond"] is not inputs["teacher_anchor"]:
        teachers.append(inputs["teacher_uncond"])
    gradients = 4 * sum(inputs[name].numel() for name in ("cond", "uncond") if inputs[name] is not None)
    return students + gradients + nbytes(teachers)


def _inputs(shape: Sequence[int], layout: str = "plain", uncond: bool = True, scale: float = 1.0, **options: Any):
    """A factory of inputs: random predictions, per-sample coefficients, and `options` on top."""

    def make(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        tensors: Inputs = {name: normal(draw, shape, dtype, device, layout, scale) for name in PREDICTIONS}
        if not uncond:
            tensors |= {"uncond": None, "teacher_uncond": None}
        lambda1_B = torch.rand(shape[0], generator=draw).to(device)
        numbers = {"guidance": 1.5, "uncond_weight": 0.3, "lambda1_B": lambda1_B}
        given = {name: o.to(device) if isinstance(o, Tensor) else o for name, o in options.items()}
        return tensors | numbers | given

    return make


def _broken(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
    """One NaN: loss, that gradient and the flag must say so."""
    inputs = _inputs((2, 4, 8, 8))(draw, dtype, device)
    inputs["teacher_cond"][1, 2, 3, 4] = float("nan")
    return inputs


def _kernel(name: str, dtype: str, **options: Any) -> AotKernel:
    latents = [f"{name}_ptr" for name in PREDICTIONS]
    stored = {name: "*fp32" for name in ("grad_cond_ptr", "grad_uncond_ptr")}
    constants = {"KIND_G": 0, "KIND_L": 2, "KIND_A": 2, "PREDICTION": 1, "BLOCK": BLOCK}
    constants |= {"HAS_UNCOND": True, "HAS_TEACHER_UNCOND": True} | options
    signature = {name: f"*{dtype}" for name in latents}
    signature |= {"guidance": "fp32", "lambda1": "*fp32", "alpha": "*fp32"} | stored
    signature |= {f"{name}_ptr": "*fp32" for name in ("partial", "loss", "loss_B", "found_inf")}
    signature |= {"ticket_ptr": "*i32", "n": "i32", "uncond_weight": "fp32"}
    signature |= {name: "constexpr" for name in constants}
    return AotKernel(name, guided_noise_loss_kernel, signature, constants, (*latents, *stored, "n"), elements=BLOCK)


SPEC = OpSpec(
    name="guided_noise_loss",
    run=_run,
    eager=_eager,
    cases=(
        Case("0 elements", _inputs((0, 4, 8, 8))),
        Case("1 element", _inputs((1, 1, 1, 1))),
        Case("63 elements", _inputs((3, 1, 7, 9))),
        Case("1000 elements", _inputs((2, 1000), guidance=torch.tensor([1.0, 3.0]))),
        Case("several chunks", _inputs((2, 4, 33, 31))),
        Case("unaligned", _inputs((2, 4, 16, 16), "unaligned")),
        Case("transposed", _inputs((2, 4, 6, 10), "transposed")),
        Case("strided", _inputs((2, 4, 6, 10), "strided")),
        Case("conditional only", _inputs((2, 4, 8, 8), uncond=False)),
        Case("v prediction", _inputs((2, 4, 8, 8), prediction_type="v_prediction", alpha_t=torch.tensor([0.1, 0.9]))),
        Case("x0 prediction", _inputs((2, 4, 8, 8), prediction_type="sample", alpha_t=0.4)),
        Case("NaN in a sample that counts", _broken),
        Case("large values", _inputs((2, 4, 8, 8), scale=1e4), (torch.float32, torch.bfloat16)),
    ),
    gradients=("cond", "uncond"),
    of_gradient="loss",
    bytes_moved=_bytes_moved,
    launches=1,
    latent=True,
    kernels=(
        *[_kernel(dtype, dtype) for dtype in SHORT.values()],
        _kernel("bf16 conditional only", "bf16", HAS_UNCOND=False, HAS_TEACHER_UNCOND=False),
    ),
    bench=lambda numel, dtype, device: _inputs((1, 4, numel // 4))(torch.Generator().manual_seed(0), dtype, device),
)
