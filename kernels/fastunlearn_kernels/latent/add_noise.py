"""The forward process: bring clean latents to a timestep.

    x_t = sqrt(A_t) x_0 + sqrt(1 - A_t) n,    A = alpha-bar

The table stays fp32 and is indexed per sample, in the kernel: schedulers that cast it to the dtype of the latents lose
the small noise levels (1 - A is about 1e-3 at the last timesteps, bf16 near 1 resolves 4e-3). Which timesteps and which
table, the caller decides.

Usage: `latents = add_noise(x0, noise, timesteps, table)`
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common import backend, scratch
from fastunlearn_kernels.common.precision import check_shapes, compute_dtype

BLOCK = 1024


def add_noise(x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Noisy latents, shape and dtype of `x0`, computed in fp32 (fp64 if x0 or noise is fp64), rounded once.

    Args:
        x0, noise: (B, C, H, W), any float dtype; gradients reach both.
        timesteps: (B,) or 0-d, integer, indices into the table. One outside of it raises IndexError on the CPU; on a
            GPU, where nothing can be raised without waiting, that sample becomes NaN.
        alphas_cumprod: (T,) table of alpha-bar, fp32 or fp64, on the device of `x0`.

    Raises:
        ValueError: shapes differ, or the table is in half precision.
    """
    check_shapes("x0", x0, noise=noise)
    if alphas_cumprod.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"alphas_cumprod must be float32 or float64, got {alphas_cumprod.dtype}: do not cast it")
    if timesteps.is_floating_point() or timesteps.numel() not in (1, len(x0)):
        raise ValueError(
            f"timesteps: expected 1 or {len(x0)} coefficients, got {timesteps.numel()} of dtype {timesteps.dtype}"
        )
    indices = timesteps.reshape(-1).to(x0.device, non_blocking=True)
    return add_noise_op(x0, noise, indices, alphas_cumprod.to(compute_dtype(x0, noise)))


def add_noise_reference(x0: Tensor, noise: Tensor, timesteps: Tensor, table: Tensor) -> Tensor:
    """x_t in plain PyTorch; arguments as the registered op's."""
    if x0.device.type == "cpu" and not ((timesteps >= 0) & (timesteps < len(table))).all():
        raise IndexError(f"timesteps must lie in 0..{len(table) - 1}, got {timesteps.tolist()}")
    dtype = compute_dtype(x0, noise)
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
    x0_ptr,  # clean latents, (B, n)
    noise_ptr,  # noise, (B, n)
    timesteps_ptr,  # indices into the table, integers, (B,) or (1,)
    table_ptr,  # alpha-bar, fp32, (steps,)
    out_ptr,  # noisy latents, written in their dtype, (B, n)
    n,  # elements of a sample
    steps,  # entries of the table
    PER_SAMPLE: tl.constexpr,  # 1: a timestep for each sample, 0: one for all
    BLOCK: tl.constexpr,  # elements of a program
):
    """Program (chunk, sample): BLOCK elements of one sample."""
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < n
    o = i_b * n + o_n
    step = tl.load(timesteps_ptr + i_b * PER_SAMPLE)
    alpha = tl.load(table_ptr + step, mask=(step >= 0) & (step < steps), other=float("nan"))
    x0 = tl.load(x0_ptr + o, mask=mask, other=0.0).to(tl.float32)
    noise = tl.load(noise_ptr + o, mask=mask, other=0.0).to(tl.float32)
    x_t = tl.sqrt(alpha) * x0 + tl.sqrt(1.0 - alpha) * noise
    tl.store(out_ptr + o, x_t.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(x0: Tensor, noise: Tensor, timesteps: Tensor, table: Tensor) -> Tensor:
    batch, n = len(x0), x0[0].numel()
    out = scratch.empty(x0.shape, x0.dtype, x0.device)
    ins = [t.contiguous() for t in (x0, noise, timesteps, table)]
    with backend.on_device(x0):
        add_noise_kernel[(triton.cdiv(n, BLOCK), batch)](
            *ins, out, n, len(table), PER_SAMPLE=int(timesteps.numel() > 1), BLOCK=BLOCK
        )
    return out


@torch.library.custom_op("fastunlearn::add_noise", mutates_args=())
def add_noise_op(x0: Tensor, noise: Tensor, timesteps: Tensor, table: Tensor) -> Tensor:
    """x_t; `timesteps` holds 1 or B integers, `table` has the dtype of the computation. On a GPU one launch."""
    tensors = (x0, noise, timesteps, table)
    return (_launch if x0.numel() and backend.runs_triton(tensors) else add_noise_reference)(*tensors)


@add_noise_op.register_fake
def _fake(x0, noise, timesteps, table):
    return x0.new_empty(x0.shape)


def _save(ctx, inputs, output):
    x0, noise, timesteps, table = inputs
    ctx.save_for_backward(timesteps, table)
    ctx.dtypes = x0.dtype, noise.dtype


def _backward(ctx, grad):
    signal, noise_level = _factors(ctx.saved_tensors[1], ctx.saved_tensors[0], grad)
    wide = grad.to(signal.dtype)
    of_x0, of_noise = ctx.dtypes
    return (signal * wide).to(of_x0), (noise_level * wide).to(of_noise), None, None


add_noise_op.register_autograd(_backward, setup_context=_save)
