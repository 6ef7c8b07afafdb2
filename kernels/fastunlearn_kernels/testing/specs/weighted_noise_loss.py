"""The spec of `weighted_noise_loss`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastunlearn_kernels.common.precision import compute_dtype
from fastunlearn_kernels.latent.prediction import prediction_number, training_target
from fastunlearn_kernels.latent.weighted_noise_loss import BLOCK, weighted_noise_loss, weighted_noise_loss_kernel
from fastunlearn_kernels.testing.common.spec import (
    LAYOUTS,
    SHORT,
    AotKernel,
    Case,
    Inputs,
    OpSpec,
    Outputs,
    nbytes,
    normal,
)


def _run(inputs: Inputs) -> Outputs:
    return weighted_noise_loss(**inputs)._asdict()


def _eager(inputs: Inputs) -> Outputs:
    """As one writes it: in the dtype of the prediction, mse_loss set by set."""
    prediction, weight_S, noise = inputs["prediction"], inputs["weight_S"], inputs["target_noise"]
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
    return latents * read // max(len(set_B), 1) + written + nbytes(set_B, weight_S)


def _inputs(
    shape: Sequence[int], layout: str = "plain", kind: str = "epsilon", scale: float = 1.0, sets: Sequence[int] = (),
    weights: Sequence[float] = (1.0, -0.5, 2.0), **options: Any,
):  # fmt: skip
    """A factory of inputs: sample b belongs to set `sets[b]`, without `sets` to b modulo their number."""

    def make(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        names = ["prediction"] + (["target_noise"] if kind != "sample" else [])
        names += ["x0"] if kind != "epsilon" else []
        tensors: Inputs = {"target_noise": None} | {n: normal(draw, shape, dtype, device, layout, scale) for n in names}
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
    constants = {"KIND_A": 0, "PREDICTION": 0, "BLOCK": BLOCK} | options
    signature = {name: f"*{dtype}" for name in ("prediction_ptr", "noise_ptr", "x0_ptr")}
    signature |= {f"{name}_ptr": "*fp32" for name in ("weight", "grad", "partial", "loss", "mean_S", "found_inf")}
    signature |= {"set_ptr": "*i64", "alpha": "*fp32" if constants["KIND_A"] else "fp32"}
    signature |= {"ticket_ptr": "*i32", "n": "i32", "sets": "i32"} | {name: "constexpr" for name in constants}
    aligned = ("prediction_ptr", "noise_ptr", "x0_ptr", "grad_ptr", "n")
    return AotKernel(name, weighted_noise_loss_kernel, signature, constants, aligned, max_registers=48, elements=BLOCK)


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
        Case("x0 prediction", _inputs((2, 4, 8, 8), kind="sample")),
        Case("large values", _inputs((2, 4, 8, 8), scale=1e4), (torch.float32, torch.bfloat16)),
    ),
    gradients=("prediction",),
    of_gradient="loss",
    bytes_moved=_bytes_moved,
    launches=1,
    latent=True,
    kernels=(
        *[_kernel(dtype, dtype) for dtype in SHORT.values()],
        _kernel("bf16 v prediction", "bf16", PREDICTION=1, KIND_A=2),
        _kernel("bf16 x0 prediction", "bf16", PREDICTION=2),
    ),
    bench=lambda numel, dtype, device: _inputs((4, 4, numel // 16))(torch.Generator().manual_seed(0), dtype, device),
)
