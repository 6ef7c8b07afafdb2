"""One step along a denoising trajectory: classifier-free guidance and a deterministic DDIM or Euler update.

With A = alpha-bar at this timestep, P at the next, less noisy one; s, s' the noise levels where x = x0 + s e:

    o   = o_0 + w (o_c - o_0)                                           guidance
    x'  = sqrt(P) x0 + sqrt(1 - P) e,  x = sqrt(A) x0 + sqrt(1 - A) e   DDIM (eta = 0)
    x'  = x + (s' - s) (x - x0) / s                                     Euler

For a model that predicts e, v or x0 each is x' = f x + h o with two numbers a sample (see `prediction`). One launch
reads each operand once, and writes the next latents and, if asked, the input of the next guided pair. Not a scheduler:
which timesteps there are, and which alpha-bar follows the last of them, the caller decides. No thresholding, no
clipping of x0, no noise added.

Usage: `latents = guided_step(o_c, o_0, latents, A, P, guidance=3.0, prediction_type="epsilon")`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn_kernels.common import backend, scratch
from fastunlearn_kernels.common.precision import check_shapes, compute_dtype
from fastunlearn_kernels.latent.coefficients import (
    Coefficient,
    broadcast,
    coefficient,
    coefficients,
    kernel_arguments,
    no_gradient,
    per_sample,
)
from fastunlearn_kernels.latent.prediction import (
    PREDICTION_TYPES,
    ddim_factors,
    ddim_factors_scalar,
    euler_factors,
    euler_factors_scalar,
    prediction_number,
)
from fastunlearn_kernels.testing.spec import SHORT, AotKernel, Case, Inputs, OpSpec, Outputs, nbytes, normal

BLOCK = 1024
RULES = ("ddim", "euler")


def apply_guidance(cond: Tensor, uncond: Tensor, guidance: Coefficient) -> Tensor:
    """uncond + guidance (cond - uncond), in fp32 (fp64 if an input is fp64). `guidance` is one number or B of them."""
    dtype = compute_dtype(cond, uncond)
    base = uncond.to(dtype)
    return base + per_sample(guidance, cond, dtype) * (cond.to(dtype) - base)


def to_epsilon(model_output: Tensor, latents: Tensor, alphas_cumprod_t: Coefficient, prediction_type: str) -> Tensor:
    """What the model's output says about the noise in `latents`; linear in `model_output`, gradients flow.

    epsilon is handed back as it came; v_prediction and sample are computed and returned in fp32 (fp64 if an input is).
    `alphas_cumprod_t` is one number or B of them, fp32 or better. Raises ValueError for an unknown prediction type.
    """
    kind = prediction_number(prediction_type)
    if kind == 0:
        return model_output
    dtype = compute_dtype(model_output, latents)
    alpha = per_sample(alphas_cumprod_t, latents, dtype)
    signal, noise_level = alpha.sqrt(), (1 - alpha).sqrt()
    output, x = model_output.to(dtype), latents.to(dtype)
    return signal * output + noise_level * x if kind == 1 else (x - signal * output) / noise_level


def ddim_step(
    model_output: Tensor, latents: Tensor, alpha_t: Coefficient, alpha_prev: Coefficient,
    prediction_type: str = "epsilon",
) -> Tensor:  # fmt: skip
    """The DDIM update with eta = 0 from alpha-bar `alpha_t` to `alpha_prev` (one number or B each, fp32 or better).

    Computed in fp32 (fp64 if an input is fp64); the result has the dtype of `latents`.
    Source: Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12.
    """
    return _step(model_output, None, latents, (1.0, alpha_t, alpha_prev), "ddim", prediction_type, False)[0]


def guided_step(
    cond: Tensor, uncond: Tensor, latents: Tensor, alpha_t: Coefficient, alpha_prev: Coefficient, *,
    guidance: Coefficient, prediction_type: str = "epsilon", duplicate: bool = False,
) -> Any:  # fmt: skip
    """`ddim_step` of `apply_guidance`: nothing is rounded in between. The result has the dtype of `latents`.

    With `duplicate` two tensors: the latents (B, ...), and the next guided pair's input cat([latents, latents]).
    """
    out = _step(cond, uncond, latents, (guidance, alpha_t, alpha_prev), "ddim", prediction_type, duplicate)
    return out if duplicate else out[0]


def guided_euler_step(
    cond: Tensor, uncond: Tensor, latents: Tensor, sigma: Coefficient, sigma_next: Coefficient, *,
    guidance: Coefficient, prediction_type: str = "epsilon", duplicate: bool = False,
) -> Any:  # fmt: skip
    """The Euler update from noise level `sigma` to `sigma_next` (one number or B each), for latents x0 + sigma n.

    The result has the dtype of `latents`. With `duplicate` two tensors: the latents (B, ...), and the next guided
    pair's input, twice latents / sqrt(sigma_next^2 + 1): such a model was trained on latents of variance one.
    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 2 with
    gamma = 0, without the second-order correction.
    """
    out = _step(cond, uncond, latents, (guidance, sigma, sigma_next), "euler", prediction_type, duplicate)
    return out if duplicate else out[0]


def _step(
    cond: Tensor, uncond: Tensor | None, latents: Tensor, given: tuple[Coefficient, Coefficient, Coefficient],
    rule: str, prediction_type: str, duplicate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kind = prediction_number(prediction_type)
    check_shapes("cond", cond, uncond=uncond, latents=latents)
    names = ("alpha_t", "alpha_prev") if rule == "ddim" else ("sigma", "sigma_next")
    sorted_ = coefficients(cond, **dict(zip(("guidance", *names), given, strict=True)))
    return guided_step_op(cond, uncond, latents, sorted_.numbers, sorted_.tables, RULES.index(rule), kind, duplicate)


def _factors(
    numbers: Sequence[float], tables: Sequence[Tensor | None], rule: int, kind: int, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(w, f, h, scale of the pair), shaped to broadcast over `like`."""
    guidance, now, after = broadcast(numbers, tables, like, dtype)
    if rule == 0:
        return guidance, *ddim_factors(now, after, kind), torch.ones_like(after)
    return guidance, *euler_factors(now, after, kind), (after * after + 1).rsqrt()


def guided_step_reference(
    cond: Tensor, uncond: Tensor | None, latents: Tensor, numbers: Sequence[float], tables: Sequence[Tensor | None],
    rule: int, prediction: int, duplicate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x', pair) in plain PyTorch; without `duplicate` the pair is empty. `numbers` and `tables` hold guidance and the
    two levels; `uncond=None` means no guidance; `rule` and `prediction` are places in RULES and PREDICTION_TYPES."""
    dtype = compute_dtype(cond, uncond, latents)
    guidance, f, h, scale = _factors(numbers, tables, rule, prediction, latents, dtype)
    output = cond.to(dtype) if uncond is None else apply_guidance(cond.to(dtype), uncond, guidance)
    x = (f * latents.to(dtype) + h * output).contiguous()
    pair = torch.cat([x * scale, x * scale]) if duplicate else x.new_empty(0)
    return x.to(latents.dtype), pair.to(latents.dtype)


@triton.jit
def guided_step_kernel(
    cond_ptr, uncond_ptr, latents_ptr, guidance, now, after, out_ptr, pair_ptr, n,
    KIND_G: tl.constexpr, KIND_N: tl.constexpr, KIND_A: tl.constexpr,
    EULER: tl.constexpr, PREDICTION: tl.constexpr, HAS_UNCOND: tl.constexpr, DUPLICATE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (chunk, sample): BLOCK elements of one sample, written once or three times."""
    i_b, batch = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < n
    o = i_b * n + o_n
    now_b, after_b = coefficient(now, i_b, KIND_N), coefficient(after, i_b, KIND_A)
    if EULER:
        f, h = euler_factors_scalar(now_b, after_b, PREDICTION)
    else:
        f, h = ddim_factors_scalar(now_b, after_b, PREDICTION)
    output = tl.load(cond_ptr + o, mask=mask, other=0.0).to(tl.float32)
    if HAS_UNCOND:
        base = tl.load(uncond_ptr + o, mask=mask, other=0.0).to(tl.float32)
        output = base + coefficient(guidance, i_b, KIND_G) * (output - base)
    x = f * tl.load(latents_ptr + o, mask=mask, other=0.0).to(tl.float32) + h * output
    tl.store(out_ptr + o, x.to(out_ptr.dtype.element_ty), mask=mask)
    if DUPLICATE:
        if EULER:
            x = x / tl.sqrt(after_b * after_b + 1.0)
        tl.store(pair_ptr + o, x.to(pair_ptr.dtype.element_ty), mask=mask)
        tl.store(pair_ptr + (o + batch * n), x.to(pair_ptr.dtype.element_ty), mask=mask)


def _launch(
    cond: Tensor, uncond: Tensor | None, latents: Tensor, numbers: Sequence[float], tables: Sequence[Tensor | None],
    rule: int, prediction: int, duplicate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, n = len(cond), cond[0].numel()
    ins = [None if t is None else t.contiguous() for t in (cond, uncond, latents)]
    out = scratch.empty(latents.shape, latents.dtype, latents.device)
    pair = scratch.empty((2 * batch, *latents.shape[1:]) if duplicate else (0,), latents.dtype, latents.device)
    given, kinds = kernel_arguments(numbers, tables)
    with backend.on_device(cond):
        guided_step_kernel[(triton.cdiv(n, BLOCK), batch)](
            *ins, *given, out, pair, n, *kinds, EULER=rule == 1, PREDICTION=prediction,
            HAS_UNCOND=uncond is not None, DUPLICATE=duplicate, BLOCK=BLOCK,
        )  # fmt: skip
    return out, pair


@torch.library.custom_op("fastunlearn::guided_step", mutates_args=())
def guided_step_op(
    cond: Tensor, uncond: Tensor | None, latents: Tensor, numbers: Sequence[float], tables: Sequence[Tensor | None],
    rule: int, prediction: int, duplicate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `guided_step_reference`; on a GPU one launch."""
    on_gpu = cond.numel() and backend.runs_triton([cond, uncond, latents, *tables])
    run = _launch if on_gpu else guided_step_reference
    return run(cond, uncond, latents, numbers, tables, rule, prediction, duplicate)


@guided_step_op.register_fake
def _fake(cond, uncond, latents, numbers, tables, rule, prediction, duplicate):
    pair_shape = (2 * len(latents), *latents.shape[1:]) if duplicate else (0,)
    return latents.new_empty(latents.shape), latents.new_empty(pair_shape)


def _save(ctx, inputs, output):
    cond, uncond, latents, ctx.numbers, tables, ctx.rule, ctx.prediction, ctx.duplicate = inputs
    ctx.save_for_backward(*tables)
    ctx.dtypes = cond.dtype, None if uncond is None else uncond.dtype, latents.dtype
    ctx.dtype = compute_dtype(cond, uncond, latents)


def _backward(ctx, grad, grad_pair):
    """x' is linear in all three."""
    guidance, f, h, scale = _factors(ctx.numbers, ctx.saved_tensors, ctx.rule, ctx.prediction, grad, ctx.dtype)
    total = grad.to(ctx.dtype)
    if ctx.duplicate:
        total = total + scale * (grad_pair[: len(grad)].to(ctx.dtype) + grad_pair[len(grad) :].to(ctx.dtype))
    of_cond, of_uncond, of_latents = ctx.dtypes
    output, rest = h * total, ((f * total).to(of_latents), None, no_gradient(ctx.saved_tensors), None, None, None)
    if of_uncond is None:
        return output.to(of_cond), None, *rest
    return (guidance * output).to(of_cond), ((1 - guidance) * output).to(of_uncond), *rest


guided_step_op.register_autograd(_backward, setup_context=_save)


def _run(inputs: Inputs) -> Outputs:
    given = dict(inputs)
    rule, uncond, duplicate = given.pop("rule"), given["uncond"], given["duplicate"]
    now, after = given.pop("now"), given.pop("after")
    if uncond is None:
        return {"latents": ddim_step(given["cond"], given["latents"], now, after, given["prediction_type"])}
    tensors = [given.pop(name) for name in ("cond", "uncond", "latents")]
    step: Callable[..., Any] = guided_step if rule == "ddim" else guided_euler_step
    out = step(*tensors, now, after, **given)
    return {"latents": out[0], "pair": out[1]} if duplicate else {"latents": out}


def _eager(inputs: Inputs) -> Outputs:
    """As samplers write it, in the dtype of the predictions: to x0, to the derivative or the noise, one step."""
    cond, uncond, x = (inputs[name] for name in ("cond", "uncond", "latents"))

    def column(value: Coefficient) -> Tensor:
        return torch.as_tensor(value, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))

    now, after, kind = column(inputs["now"]), column(inputs["after"]), prediction_number(inputs["prediction_type"])
    output = cond if uncond is None else uncond + column(inputs["guidance"]) * (cond - uncond)
    scale = torch.ones_like(after)
    if inputs["rule"] == "ddim":
        signal, level = now.sqrt(), (1 - now).sqrt()
        x0 = ((x - level * output) / signal, signal * x - level * output, output)[kind]
        noise = (output, signal * output + level * x, (x - signal * output) / level)[kind]
        x = after.sqrt() * x0 + (1 - after).sqrt() * noise
    else:
        scale = (after**2 + 1).rsqrt()
        x0 = (x - now * output, x / (now**2 + 1) - output * now / (now**2 + 1).sqrt(), output)[kind]
        x = x + (after - now) * (x - x0) / now
    return {"latents": x} | ({"pair": torch.cat([x * scale, x * scale])} if inputs["duplicate"] else {})


def _bytes_moved(inputs: Inputs) -> int:
    written = nbytes(inputs["latents"]) * (3 if inputs["duplicate"] else 1)
    tables = [inputs[name] for name in ("guidance", "now", "after") if isinstance(inputs[name], Tensor)]
    return nbytes(inputs["cond"], inputs["uncond"], inputs["latents"], tables) + written


def _inputs(shape: Sequence[int], layout: str = "plain", rule: str = "ddim", scale: float = 1.0, **options: Any):
    """A factory of inputs for a step from a middling noise level to a lower one."""

    def make(draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        names = ("cond", "uncond", "latents")
        tensors: Inputs = {name: normal(draw, shape, dtype, device, layout, scale) for name in names}
        now, after = (0.25, 0.5) if rule == "ddim" else (4.0, 1.5)
        given = {"rule": rule, "now": now, "after": after, "guidance": 3.0, "prediction_type": "epsilon"}
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in options.items()}
        return tensors | given | {"duplicate": False} | moved

    return make


def _levels(rule: str, prediction_type: str) -> Case:
    """Levels per sample: far apart, equal, and down to no noise at all."""
    levels = {"ddim": ([0.01, 0.7, 0.9], [0.02, 0.7, 1.0]), "euler": ([14.6, 0.5, 0.03], [11.0, 0.5, 0.0])}
    now, after = (torch.tensor(values) for values in levels[rule])
    options: Inputs = {"rule": rule, "now": now, "after": after, "prediction_type": prediction_type, "duplicate": True}
    return Case(f"{rule} {prediction_type}", _inputs((3, 4, 9, 7), **options))


def _kernel(name: str, dtype: str, **options: Any) -> AotKernel:
    constants = {
        "KIND_G": 0, "KIND_N": 0, "KIND_A": 0, "EULER": False, "PREDICTION": 0, "HAS_UNCOND": True, "DUPLICATE": True,
        "BLOCK": BLOCK,
    } | options  # fmt: skip
    latents = ("cond_ptr", "uncond_ptr", "latents_ptr", "out_ptr", "pair_ptr")
    numbers = {"guidance": "KIND_G", "now": "KIND_N", "after": "KIND_A"}
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
        Case("0 elements", _inputs((0, 4, 8, 8), duplicate=True)),
        Case("1 element", _inputs((1, 1, 1, 1), duplicate=True)),
        Case("63 elements", _inputs((3, 1, 7, 9), guidance=torch.tensor([1.0, 3.0, 7.5]))),
        Case("1000 elements", _inputs((2, 1000), rule="euler")),
        Case("several chunks", _inputs((2, 4, 33, 31), duplicate=True)),
        Case("unaligned", _inputs((2, 4, 16, 16), "unaligned", duplicate=True)),
        Case("transposed", _inputs((2, 4, 6, 10), "transposed", duplicate=True)),
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
        _kernel("bf16 v prediction, per sample", "bf16", PREDICTION=1, KIND_N=2, KIND_A=2),
        _kernel("bf16 x0 prediction, no guidance", "bf16", PREDICTION=2, HAS_UNCOND=False, DUPLICATE=False),
        _kernel("bf16 Euler", "bf16", EULER=True),
    ),
    bench=lambda numel, dtype, device: _inputs((1, 4, numel // 4), duplicate=True)(torch.Generator(), dtype, device),
)
