"""The forward process: bring clean latents to a timestep.

    x_t = sqrt(A_t) x_0 + sqrt(1 - A_t) n,    A = alpha-bar

The table stays fp32 and is indexed per sample, in the kernel: schedulers that cast it to the dtype of the latents lose
the small noise levels (1 - A is about 1e-3 at the last timesteps, bf16 near 1 resolves 4e-3). The noise is either given
or made on the spot from one seed a sample (see `noise`): then it is written nowhere, and `weighted_noise_loss` makes
the same numbers again. Not a scheduler: which timesteps and which table, the caller decides.

Usage: `latents = add_noise(x0, noise, timesteps, table)` or `add_noise(x0, None, timesteps, table, seed_B=seeds)`
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common import backend, scratch
from fastunlearn_kernels.common.noise import check_seeds, gaussian, gaussian_tile
from fastunlearn_kernels.common.precision import check_shapes, compute_dtype
from fastunlearn_kernels.testing.spec import SHORT, AotKernel, Case, Inputs, OpSpec, Outputs, nbytes, normal

BLOCK = 1024


def add_noise(
    x0: Tensor, noise: Tensor | None, timesteps: Tensor, alphas_cumprod: Tensor, *, seed_B: Tensor | None = None
) -> Tensor:
    """Noisy latents, shape and dtype of `x0`, computed in fp32 (fp64 if x0 or noise is fp64), rounded once.

    Args:
        x0, noise: (B, C, H, W), any float dtype; gradients reach both.
        timesteps: (B,) or 0-d, integer, indices into the table. One outside of it raises IndexError on the CPU; on a
            GPU, where nothing can be raised without waiting, that sample becomes NaN.
        alphas_cumprod: (T,) table of alpha-bar, fp32 or fp64, on the device of `x0`.
        seed_B: (B,) int64 instead of `noise=`: the noise is that of `noise.gaussian`, made in fp32 and not stored.

    Raises:
        ValueError: shapes differ, the table is in half precision, or not exactly one of noise and seed_B is given.
    """
    check_shapes("x0", x0, noise=noise)
    if (noise is None) == (seed_B is None):
        raise ValueError("exactly one of noise and seed_B must be given")
    if alphas_cumprod.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"alphas_cumprod must be float32 or float64, got {alphas_cumprod.dtype}: do not cast it")
    if timesteps.is_floating_point() or timesteps.numel() not in (1, len(x0)):
        raise ValueError(
            f"timesteps: expected 1 or {len(x0)} coefficients, got {timesteps.numel()} of dtype {timesteps.dtype}"
        )
    check_seeds(seed_B, len(x0))
    indices = timesteps.reshape(-1).to(x0.device, non_blocking=True)
    return add_noise_op(x0, noise, indices, alphas_cumprod.to(compute_dtype(x0, noise)), seed_B)


def add_noise_reference(
    x0: Tensor, noise: Tensor | None, timesteps: Tensor, table: Tensor, seed_B: Tensor | None
) -> Tensor:
    """x_t in plain PyTorch; arguments as the registered op's."""
    if x0.device.type == "cpu" and not ((timesteps >= 0) & (timesteps < len(table))).all():
        raise IndexError(f"timesteps must lie in 0..{len(table) - 1}, got {timesteps.tolist()}")
    dtype = compute_dtype(x0, noise)
    if noise is None:
        assert seed_B is not None
        noise = gaussian(seed_B, tuple(x0.shape), dtype)
    signal, noise_level = _factors(table, timesteps, x0)
    return (signal * x0.to(dtype) + noise_level * noise.to(dtype)).to(x0.dtype).contiguous()


def _factors(table: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(sqrt(A), sqrt(1 - A)), shaped to broadcast over `like`; NaN where the timestep is outside of the table."""
    padded = torch.cat([table, table.new_full((1,), float("nan"))])
    inside = (timesteps >= 0) & (timesteps < len(table))
    alpha = padded[timesteps.where(inside, len(table))].reshape(-1, *[1] * (like.dim() - 1))
    return alpha.sqrt(), (1 - alpha).sqrt()


@triton.jit
def add_noise_kernel(
    x0_ptr, noise_ptr, timesteps_ptr, table_ptr, seed_ptr, out_ptr, n, steps,
    PER_SAMPLE: tl.constexpr, HAS_NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (chunk, sample): BLOCK elements of one sample. PER_SAMPLE: 1 if there is a timestep for each, else 0."""
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < n
    o = i_b * n + o_n
    step = tl.load(timesteps_ptr + i_b * PER_SAMPLE)
    alpha = tl.load(table_ptr + step, mask=(step >= 0) & (step < steps), other=float("nan"))
    x0 = tl.load(x0_ptr + o, mask=mask, other=0.0).to(tl.float32)
    if HAS_NOISE:
        noise = tl.load(noise_ptr + o, mask=mask, other=0.0).to(tl.float32)
    else:
        noise = gaussian_tile(tl.load(seed_ptr + i_b), o_n)
    x_t = tl.sqrt(alpha) * x0 + tl.sqrt(1.0 - alpha) * noise
    tl.store(out_ptr + o, x_t.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(x0: Tensor, noise: Tensor | None, timesteps: Tensor, table: Tensor, seed_B: Tensor | None) -> Tensor:
    batch, n = len(x0), x0[0].numel()
    out = scratch.empty(x0.shape, x0.dtype, x0.device)
    ins = [None if t is None else t.contiguous() for t in (x0, noise, timesteps, table, seed_B)]
    with backend.on_device(x0):
        add_noise_kernel[(triton.cdiv(n, BLOCK), batch)](
            *ins, out, n, len(table), PER_SAMPLE=int(timesteps.numel() > 1), HAS_NOISE=noise is not None, BLOCK=BLOCK
        )
    return out


@torch.library.custom_op("fastunlearn::add_noise", mutates_args=())
def add_noise_op(x0: Tensor, noise: Tensor | None, timesteps: Tensor, table: Tensor, seed_B: Tensor | None) -> Tensor:
    """x_t; `timesteps` holds 1 or B integers, `table` has the dtype of the computation. On a GPU one launch."""
    tensors = (x0, noise, timesteps, table, seed_B)
    return (_launch if x0.numel() and backend.runs_triton(tensors) else add_noise_reference)(*tensors)


@add_noise_op.register_fake
def _fake(x0, noise, timesteps, table, seed_B):
    return x0.new_empty(x0.shape)


def _save(ctx, inputs, output):
    x0, noise, timesteps, table, _ = inputs
    ctx.save_for_backward(timesteps, table)
    ctx.dtypes = x0.dtype, None if noise is None else noise.dtype


def _backward(ctx, grad):
    signal, noise_level = _factors(ctx.saved_tensors[1], ctx.saved_tensors[0], grad)
    wide = grad.to(signal.dtype)
    of_x0, of_noise = ctx.dtypes
    return (signal * wide).to(of_x0), None if of_noise is None else (noise_level * wide).to(of_noise), None, None, None


add_noise_op.register_autograd(_backward, setup_context=_save)


def _run(inputs: Inputs) -> Outputs:
    return {"x_t": add_noise(**inputs)}


def _eager(inputs: Inputs) -> Outputs:
    """As one writes it, with everything in the dtype of the latents but the table, which is cast after the roots."""
    x0, noise, timesteps = inputs["x0"], inputs["noise"], inputs["timesteps"]
    if noise is None:
        noise = gaussian(inputs["seed_B"], tuple(x0.shape), x0.dtype)
    alpha = inputs["alphas_cumprod"][timesteps].reshape(-1, *[1] * (x0.dim() - 1))
    return {"x_t": alpha.sqrt().to(x0.dtype) * x0 + (1 - alpha).sqrt().to(x0.dtype) * noise}


def _bytes_moved(inputs: Inputs) -> int:
    of_table = inputs["timesteps"].numel() * inputs["alphas_cumprod"].element_size()
    return nbytes(inputs["x0"], inputs["x0"], inputs["noise"], inputs["timesteps"], inputs.get("seed_B")) + of_table


def _inputs(shape: Sequence[int], layout: str = "plain", seeds: bool = False, one: bool = False, scale: float = 1.0):
    """A factory of inputs: a linear table of 1000 entries, and a timestep for each sample or (`one`) for all."""

    def make(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        inputs: Inputs = {"x0": normal(draw, shape, dtype, device, layout, scale), "noise": None}
        if seeds:
            inputs["seed_B"] = torch.randint(-(2**63), 2**63 - 1, (shape[0],), generator=draw).to(device)
        else:
            inputs["noise"] = normal(draw, shape, dtype, device, layout, scale)
        timesteps = torch.randint(0, 1000, () if one else (shape[0],), generator=draw)
        table = (1 - betas).cumprod(0).float()
        return inputs | {"timesteps": timesteps.to(device), "alphas_cumprod": table.to(device)}

    return make


def _kernel(name: str, dtype: str, **options: object) -> AotKernel:
    constants = {"PER_SAMPLE": 1, "HAS_NOISE": True, "BLOCK": BLOCK} | options
    signature = {"x0_ptr": f"*{dtype}", "noise_ptr": f"*{dtype}", "timesteps_ptr": "*i64", "table_ptr": "*fp32"}
    signature |= {"seed_ptr": "*i64", "out_ptr": f"*{dtype}", "n": "i32", "steps": "i32"}
    signature |= {name: "constexpr" for name in constants}
    aligned, budget = ("x0_ptr", "noise_ptr", "out_ptr", "n"), 40 if constants["HAS_NOISE"] else 56
    return AotKernel(name, add_noise_kernel, signature, constants, aligned, max_registers=budget, elements=BLOCK)


SPEC = OpSpec(
    name="add_noise",
    run=_run,
    eager=_eager,
    cases=(
        Case("0 elements", _inputs((0, 4, 8, 8))),
        Case("empty samples", _inputs((2, 4, 0, 8), seeds=True)),
        Case("1 element", _inputs((1, 1, 1, 1))),
        Case("63 elements", _inputs((3, 1, 7, 9))),
        Case("1000 elements", _inputs((2, 1000))),
        Case("several chunks", _inputs((2, 4, 33, 31))),
        Case("unaligned", _inputs((2, 4, 16, 16), "unaligned")),
        Case("transposed", _inputs((2, 4, 6, 10), "transposed")),
        Case("strided", _inputs((2, 4, 6, 10), "strided")),
        Case("one timestep for all", _inputs((3, 4, 8, 8), one=True)),
        Case("seeds", _inputs((3, 4, 8, 8), seeds=True)),
        Case("seeds, several chunks", _inputs((2, 4, 33, 31), seeds=True)),
        Case("seeds, transposed", _inputs((2, 4, 6, 10), "transposed", seeds=True)),
        Case("large values", _inputs((2, 4, 8, 8), scale=1e4), (torch.float32, torch.bfloat16)),
    ),
    gradients=("x0", "noise"),
    of_gradient="x_t",
    bytes_moved=_bytes_moved,
    launches=1,
    latent=True,
    kernels=(
        *[_kernel(dtype, dtype) for dtype in SHORT.values()],
        *[_kernel(f"{dtype} seeds", dtype, HAS_NOISE=False) for dtype in SHORT.values()],
    ),
    bench=lambda numel, dtype, device: _inputs((1, 4, numel // 4))(torch.Generator().manual_seed(0), dtype, device),
)
