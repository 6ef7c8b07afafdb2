"""The spec of `add_noise`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastunlearn_kernels.latent.add_noise import BLOCK, add_noise, add_noise_kernel
from fastunlearn_kernels.testing.common.spec import SHORT, AotKernel, Case, Inputs, OpSpec, Outputs, nbytes, normal


def _run(inputs: Inputs) -> Outputs:
    return {"x_t": add_noise(**inputs)}


def _eager(inputs: Inputs) -> Outputs:
    """As one writes it, with everything in the dtype of the latents but the table, which is cast after the roots."""
    x0, noise, timesteps = inputs["x0"], inputs["noise"], inputs["timesteps"]
    alpha = inputs["alphas_cumprod"][timesteps].reshape(-1, *[1] * (x0.dim() - 1))
    return {"x_t": alpha.sqrt().to(x0.dtype) * x0 + (1 - alpha).sqrt().to(x0.dtype) * noise}


def _bytes_moved(inputs: Inputs) -> int:
    of_table = inputs["timesteps"].numel() * inputs["alphas_cumprod"].element_size()
    return nbytes(inputs["x0"], inputs["x0"], inputs["noise"], inputs["timesteps"]) + of_table


def _inputs(shape: Sequence[int], layout: str = "plain", one: bool = False, scale: float = 1.0):
    """A factory of inputs: a linear table of 1000 entries, and a timestep for each sample or (`one`) for all."""

    def make(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        inputs: Inputs = {name: normal(draw, shape, dtype, device, layout, scale) for name in ("x0", "noise")}
        timesteps = torch.randint(0, 1000, () if one else (shape[0],), generator=draw)
        table = (1 - betas).cumprod(0).float()
        return inputs | {"timesteps": timesteps.to(device), "alphas_cumprod": table.to(device)}

    return make


def _kernel(name: str) -> AotKernel:
    latents, constants = ("x0_ptr", "noise_ptr", "out_ptr"), {"PER_SAMPLE": 1, "BLOCK": BLOCK}
    signature = dict.fromkeys(latents, f"*{name}") | {"timesteps_ptr": "*i64", "table_ptr": "*fp32"}
    signature |= {"n": "i32", "steps": "i32"} | dict.fromkeys(constants, "constexpr")
    aligned = (*latents, "n")
    return AotKernel(name, add_noise_kernel, signature, constants, aligned, max_registers=40, elements=BLOCK)


SPEC = OpSpec(
    name="add_noise",
    run=_run,
    eager=_eager,
    cases=(
        Case("0 elements", _inputs((0, 4, 8, 8))),
        Case("empty samples", _inputs((2, 4, 0, 8))),
        Case("1 element", _inputs((1, 1, 1, 1))),
        Case("63 elements", _inputs((3, 1, 7, 9))),
        Case("1000 elements", _inputs((2, 1000))),
        Case("several chunks", _inputs((2, 4, 33, 31))),
        Case("unaligned", _inputs((2, 4, 16, 16), "unaligned")),
        Case("transposed", _inputs((2, 4, 6, 10), "transposed")),
        Case("strided", _inputs((2, 4, 6, 10), "strided")),
        Case("one timestep for all", _inputs((3, 4, 8, 8), one=True)),
        Case("large values", _inputs((2, 4, 8, 8), scale=1e4), (torch.float32, torch.bfloat16)),
    ),
    gradients=("x0", "noise"),
    of_gradient="x_t",
    bytes_moved=_bytes_moved,
    launches=1,
    latent=True,
    kernels=tuple(_kernel(dtype) for dtype in SHORT.values()),
    bench=lambda numel, dtype, device: _inputs((1, 4, numel // 4))(torch.Generator().manual_seed(0), dtype, device),
)
