"""The spec of `guided_step`, whose rules are DDIM's and Euler's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastunlearn_kernels.latent.coefficients import Coefficient
from fastunlearn_kernels.latent.guided_step import (
    BLOCK,
    RULES,
    ddim_step,
    guided_euler_step,
    guided_step,
    guided_step_kernel,
)
from fastunlearn_kernels.latent.prediction import PREDICTION_TYPES, prediction_number
from fastunlearn_kernels.testing.common.spec import SHORT, AotKernel, Case, Inputs, OpSpec, Outputs, nbytes, normal


def _run(inputs: Inputs) -> Outputs:
    given = dict(inputs)
    rule, uncond, level, next_level = (given.pop(name) for name in ("rule", "uncond", "level", "next_level"))
    cond, latents = given.pop("cond"), given.pop("latents")
    if uncond is None:
        return {"latents": ddim_step(cond, latents, level, next_level, given["prediction_type"])}
    step = guided_step if rule == "ddim" else guided_euler_step
    return {"latents": step(cond, uncond, latents, level, next_level, **given)}


def _eager(inputs: Inputs) -> Outputs:
    """As samplers write it, in the dtype of the predictions: to x0, to the derivative or the noise, one step."""
    cond, uncond, x = (inputs[name] for name in ("cond", "uncond", "latents"))

    def column(value: Coefficient) -> Tensor:
        return torch.as_tensor(value, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))

    level, next_level = column(inputs["level"]), column(inputs["next_level"])
    kind = prediction_number(inputs["prediction_type"])
    output = cond if uncond is None else uncond + column(inputs["guidance"]) * (cond - uncond)
    if inputs["rule"] == "ddim":
        signal, noise_level = level.sqrt(), (1 - level).sqrt()
        x0 = ((x - noise_level * output) / signal, signal * x - noise_level * output, output)[kind]
        noise = (output, signal * output + noise_level * x, (x - signal * output) / noise_level)[kind]
        x = next_level.sqrt() * x0 + (1 - next_level).sqrt() * noise
    else:
        square = level**2 + 1
        x0 = (x - level * output, x / square - output * level / square.sqrt(), output)[kind]
        x = x + (next_level - level) * (x - x0) / level
    return {"latents": x}


def _bytes_moved(inputs: Inputs) -> int:
    tables = [inputs[name] for name in ("guidance", "level", "next_level") if isinstance(inputs[name], Tensor)]
    return nbytes(inputs["cond"], inputs["uncond"], inputs["latents"], inputs["latents"], tables)


def _inputs(shape: Sequence[int], layout: str = "plain", rule: str = "ddim", scale: float = 1.0, **options: Any):
    """A factory of inputs for a step from a middling noise level to a lower one."""

    def make(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        names = ("cond", "uncond", "latents")
        tensors: Inputs = {name: normal(draw, shape, dtype, device, layout, scale) for name in names}
        level, next_level = (0.25, 0.5) if rule == "ddim" else (4.0, 1.5)
        given = {"rule": rule, "level": level, "next_level": next_level, "guidance": 3.0, "prediction_type": "epsilon"}
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in options.items()}
        return tensors | given | moved

    return make


def _levels(rule: str, prediction_type: str) -> Case:
    """Levels per sample: far apart, equal, and down to no noise at all."""
    levels = {"ddim": ([0.01, 0.7, 0.9], [0.02, 0.7, 1.0]), "euler": ([14.6, 0.5, 0.03], [11.0, 0.5, 0.0])}
    level, next_level = (torch.tensor(values) for values in levels[rule])
    options: Inputs = {"rule": rule, "level": level, "next_level": next_level, "prediction_type": prediction_type}
    return Case(f"{rule} {prediction_type}", _inputs((3, 4, 9, 7), **options))


def _kernel(name: str, dtype: str, **options: Any) -> AotKernel:
    constants = {"KIND_G": 0, "KIND_L": 0, "KIND_N": 0, "EULER": False, "PREDICTION": 0, "HAS_UNCOND": True}
    constants |= {"BLOCK": BLOCK} | options
    latents = ("cond_ptr", "uncond_ptr", "latents_ptr", "out_ptr")
    numbers = {"guidance": "KIND_G", "level": "KIND_L", "next_level": "KIND_N"}
    signature = {name: f"*{dtype}" for name in latents} | {"n": "i32"}
    signature |= {name: "*fp32" if constants[kind] else "fp32" for name, kind in numbers.items()}
    signature |= {name: "constexpr" for name in constants}
    aligned = (*latents, "n")
    return AotKernel(name, guided_step_kernel, signature, constants, aligned, max_registers=40, elements=BLOCK)


SPEC = OpSpec(
    name="guided_step",
    run=_run,
    eager=_eager,
    cases=(
        Case("0 elements", _inputs((0, 4, 8, 8))),
        Case("1 element", _inputs((1, 1, 1, 1))),
        Case("63 elements", _inputs((3, 1, 7, 9), guidance=torch.tensor([1.0, 3.0, 7.5]))),
        Case("1000 elements", _inputs((2, 1000), rule="euler")),
        Case("several chunks", _inputs((2, 4, 33, 31))),
        Case("unaligned", _inputs((2, 4, 16, 16), "unaligned")),
        Case("transposed", _inputs((2, 4, 6, 10), "transposed")),
        Case("strided", _inputs((2, 4, 6, 10), "strided")),
        Case("no guidance", _inputs((2, 4, 8, 8), uncond=None, guidance=1.0)),
        *[_levels(rule, kind) for rule in RULES for kind in PREDICTION_TYPES],
        Case("large values", _inputs((2, 4, 8, 8), scale=1e4), (torch.float32, torch.bfloat16)),
    ),
    gradients=("cond", "uncond", "latents"),
    of_gradient="latents",
    bytes_moved=_bytes_moved,
    launches=1,
    latent=True,
    kernels=(
        *[_kernel(dtype, dtype) for dtype in SHORT.values()],
        _kernel("bf16 v prediction, per sample", "bf16", PREDICTION=1, KIND_L=2, KIND_N=2),
        _kernel("bf16 x0 prediction, no guidance", "bf16", PREDICTION=2, HAS_UNCOND=False),
        _kernel("bf16 Euler", "bf16", EULER=True),
    ),
    bench=lambda numel, dtype, device: _inputs((1, 4, numel // 4))(torch.Generator(), dtype, device),
)
