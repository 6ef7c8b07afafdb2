"""The latent-space ops (add_noise, weighted_noise_loss, guided_step) against formulas written by hand.

What every op is held to from its spec alone, the interpreter against fp64 case by case, is in test_kernels_ops.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from kernel_checks import device
from torch import Tensor

from fastunlearn_kernels import PREDICTION_TYPES
from fastunlearn_kernels.common import backend
from fastunlearn_kernels.latent.add_noise import add_noise, add_noise_op
from fastunlearn_kernels.latent.guided_step import guided_euler_step, guided_step, guided_step_op
from fastunlearn_kernels.latent.weighted_noise_loss import weighted_noise_loss, weighted_noise_loss_op
from fastunlearn_kernels.testing.specs.add_noise import SPEC as ADD_NOISE
from fastunlearn_kernels.testing.specs.guided_step import SPEC as GUIDED_STEP
from fastunlearn_kernels.testing.specs.weighted_noise_loss import SPEC as WEIGHTED_NOISE_LOSS

DEVICE = device()
SHAPE = (4, 3, 7, 13)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Neighbours on a fine schedule, far apart, no step at all, and down to the image itself.
ALPHAS = [(0.00466, 0.0048), (0.05, 0.95), (0.6, 0.6), (0.9991, 0.99915), (0.9, 1.0)]
SIGMAS = [(14.6146, 14.58), (14.6, 0.0292), (2.0, 2.0), (0.0292, 0.0291), (0.03, 0.0)]


@pytest.fixture(params=["reference", "triton"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with backend.force(request.param):
        yield request.param


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def table() -> Tensor:
    """SDXL's alpha-bar."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float().to(DEVICE)


# --- add_noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_noise_is_the_formula_rounded_once(each_backend: str, dtype: torch.dtype) -> None:
    x0, noise, alphas = randn(*SHAPE, dtype=dtype), randn(*SHAPE, dtype=dtype), table()
    timesteps = torch.tensor([0, 1, 500, 999], device=DEVICE)
    mine = add_noise(x0, noise, timesteps, alphas)
    assert mine.dtype == dtype
    for b, t in enumerate(timesteps.tolist()):
        a = alphas[t].double()
        exact = a.sqrt() * x0[b].double() + (1 - a).sqrt() * noise[b].double()
        torch.testing.assert_close(mine[b].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(add_noise(x0, noise, timesteps[2], alphas)[2], mine[2])  # one timestep for all


def test_add_noise_passes_gradients_to_image_and_noise(each_backend: str) -> None:
    x0, noise = randn(*SHAPE).requires_grad_(), randn(*SHAPE, dtype=torch.bfloat16).requires_grad_()
    alphas, timesteps, cotangent = table(), torch.tensor([3, 40, 500, 999], device=DEVICE), randn(*SHAPE)
    grads = torch.autograd.grad(add_noise(x0, noise, timesteps, alphas), (x0, noise), cotangent)
    a = alphas[timesteps].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(grads[0], a.sqrt() * cotangent)
    torch.testing.assert_close(grads[1], ((1 - a).sqrt() * cotangent).bfloat16())
    exact = [randn(2, 2, 3, 2, dtype=torch.float64).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda x, n: add_noise(x, n, timesteps[:2], alphas), exact)


@pytest.mark.parametrize("timestep", [-1, 1000, 2**40, -(2**40)])
def test_a_timestep_outside_of_the_table_is_not_read(timestep: int) -> None:
    x0, noise, timesteps = randn(*SHAPE), randn(*SHAPE), torch.tensor([5, timestep, 7, 8], device=DEVICE)
    with backend.force("triton"):
        x_t = add_noise(x0, noise, timesteps, table())
    assert x_t[1].isnan().all() and x_t[[0, 2, 3]].isfinite().all()
    with backend.force("reference"), pytest.raises(IndexError, match=r"timesteps must lie in 0\.\.999"):
        add_noise(x0.cpu(), noise.cpu(), timesteps.cpu(), table().cpu())


def test_add_noise_refuses_what_does_not_fit() -> None:
    x0, t, alphas = randn(*SHAPE), torch.zeros(4, dtype=torch.int64, device=DEVICE), table()
    with pytest.raises(ValueError, match="noise has shape"):
        add_noise(x0, x0[:2], t, alphas)
    with pytest.raises(ValueError, match="expected 1 or 4"):
        add_noise(x0, x0, t[:3], alphas)


# --- weighted_noise_loss ----------------------------------------------------------------------------------------------


def loss_by_hand(
    prediction: Tensor, noise: Tensor, x0: Tensor, alpha_B: Tensor, set_B: list[int], weights: list[float], kind: str
) -> tuple[Tensor, list[float]]:
    """Sample by sample, in fp64; ignored samples are never looked at."""
    loss, means = torch.zeros((), dtype=torch.float64), []
    for s, weight in enumerate(weights):
        members = [b for b, i in enumerate(set_B) if i == s] if weight else []
        total = torch.zeros((), dtype=torch.float64)
        for b in members:
            a, n, x = alpha_B[b].double().cpu(), noise[b].double().cpu(), x0[b].double().cpu()
            target = {"epsilon": n, "v_prediction": a.sqrt() * n - (1 - a).sqrt() * x, "sample": x}[kind]
            total = total + ((prediction[b].double().cpu() - target) ** 2).mean()
        means.append(total.item() / max(len(members), 1))
        loss = loss + weight * total / max(len(members), 1)
    return loss, means


SETS, WEIGHTS = [2, 0, 7, 2, -1, 1, 2], [-0.75, 0.0, 2.0, 5.0]  # set 1 has weight 0, set 3 is empty


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_loss_means_and_gradient_are_the_formula(each_backend: str, dtype: torch.dtype, kind: str) -> None:
    shape = (len(SETS), 3, 19, 23)
    prediction, noise, x0 = (randn(*shape, dtype=dtype) for _ in range(3))
    alpha_B, prediction = torch.linspace(0.1, 0.9, len(SETS), device=DEVICE), prediction.requires_grad_()
    weight_S = torch.tensor(WEIGHTS, device=DEVICE)
    options: dict[str, Any] = {"x0": x0, "alpha_t": alpha_B, "prediction_type": kind}
    loss, mean_S, found_inf = weighted_noise_loss(prediction, noise, integers(*SETS), weight_S, **options)
    (gradient,) = torch.autograd.grad(loss * 3, prediction)
    leaf = prediction.detach().double().requires_grad_()
    exact, means = loss_by_hand(leaf, noise, x0, alpha_B, SETS, WEIGHTS, kind)
    (exact_gradient,) = torch.autograd.grad(exact * 3, leaf)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(loss.double().cpu(), exact.detach(), rtol=tolerance, atol=0)
    assert mean_S.tolist() == pytest.approx(means, rel=tolerance) and mean_S[1] == 0 and mean_S[3] == 0
    assert found_inf == 0 and found_inf.dtype == torch.float32 and not mean_S.requires_grad
    assert gradient.dtype == dtype
    # fp16 has an absolute step of 6e-8 near zero.
    relative, absolute = max(torch.finfo(dtype).eps, tolerance), 0 if dtype == torch.float64 else 1e-7
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=relative, atol=absolute)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_loss_passes_gradcheck(kind: str) -> None:
    prediction, noise, x0 = (randn(5, 2, 3, 2, dtype=torch.float64) for _ in range(3))
    weight_S = torch.tensor([1.5, -2.0], dtype=torch.float64, device=DEVICE)

    def loss(p: Tensor) -> Tensor:
        given: dict[str, Any] = {"x0": x0, "alpha_t": 0.3, "prediction_type": kind}
        return weighted_noise_loss(p, noise, integers(0, 1, 1, 5, 0), weight_S, **given).loss * 2.5

    assert torch.autograd.gradcheck(loss, prediction.requires_grad_())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_ignored_samples_contribute_exactly_nothing(each_backend: str, poison: float) -> None:
    set_B, weight_S = integers(0, -1, 1, 3, 0, 2), torch.tensor([1.0, 0.0, -0.5], device=DEVICE)
    ignored = [1, 2, 3]  # outside, in the set of weight 0, outside

    def outcome(value: float) -> list[Tensor]:
        torch.manual_seed(3)
        prediction, noise = randn(6, 4, 17, 19), randn(6, 4, 17, 19)
        prediction[ignored], noise[ignored] = value, value
        prediction.requires_grad_()
        loss, mean_S, found_inf = weighted_noise_loss(prediction, noise, set_B, weight_S)
        return [loss, mean_S, found_inf, *torch.autograd.grad(loss, prediction)]

    clean, dirty = outcome(0.0), outcome(poison)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert dirty[2] == 0 and (dirty[3][ignored] == 0).all() and (dirty[3][[0, 4, 5]] != 0).any()


def test_what_is_not_finite_is_flagged(each_backend: str) -> None:
    prediction, noise = randn(2, 4, 9, 9), randn(2, 4, 9, 9)
    prediction[1, 3, 8, 8] = float("nan")
    out = weighted_noise_loss(prediction, noise, integers(0, 1), torch.ones(2, device=DEVICE))
    assert out.found_inf == 1 and out.loss.isnan() and out.mean_S[0].isfinite() and out.mean_S[1].isnan()


def test_loss_does_not_depend_on_the_order_of_samples_or_the_memory_layout(each_backend: str) -> None:
    prediction, noise, set_B = randn(5, 4, 6, 10), randn(5, 4, 6, 10), integers(0, 1, 1, 0, 1)
    weight_S, order = torch.tensor([1.0, -0.5], device=DEVICE), torch.tensor([3, 1, 4, 0, 2], device=DEVICE)
    loss = weighted_noise_loss(prediction, noise, set_B, weight_S).loss
    torch.testing.assert_close(weighted_noise_loss(prediction[order], noise[order], set_B[order], weight_S).loss, loss)
    p, n = (t.to(memory_format=torch.channels_last) for t in (prediction, noise))
    assert torch.equal(weighted_noise_loss(p, n, set_B, weight_S).loss, loss)
    assert torch.equal(weighted_noise_loss(prediction, noise, set_B.int(), weight_S).loss, loss)


def test_loss_refuses_what_does_not_fit() -> None:
    p, sets, weight = randn(2, 4, 5, 5), integers(0, 0), torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match="'epsilon' needs target_noise"):
        weighted_noise_loss(p, None, sets, weight)
    with pytest.raises(ValueError, match=r"'sample' needs x0$"):
        weighted_noise_loss(p, None, sets, weight, prediction_type="sample")
    with pytest.raises(ValueError, match="'v_prediction' needs x0 and alpha_t"):
        weighted_noise_loss(p, p, sets, weight, x0=p, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="set_B must hold 2 integers"):
        weighted_noise_loss(p, p, sets[:1], weight)
    with pytest.raises(ValueError, match="weight_S must be"):
        weighted_noise_loss(p, p, sets, weight.half())
    with pytest.raises(ValueError, match="target_noise has shape"):
        weighted_noise_loss(p, p[:1], sets, weight)


# --- guided_step ------------------------------------------------------------------------------------------------------


def step_by_hand(rule: str, output: Tensor, x: Tensor, level: float, next_level: float, kind: str) -> Tensor:
    """By way of the noise and the image, in fp64, with the levels as fp32 holds them."""
    o, x = output.double(), x.double()
    a, p = (float(torch.tensor(v, dtype=torch.float32)) for v in (level, next_level))
    if rule == "ddim":
        e = {"epsilon": lambda: o, "v_prediction": lambda: a**0.5 * o + (1 - a) ** 0.5 * x}.get(
            kind, lambda: (x - a**0.5 * o) / (1 - a) ** 0.5
        )()
        image = (x - (1 - a) ** 0.5 * e) / a**0.5
        return p**0.5 * image + (1 - p) ** 0.5 * e
    unit = x / math.sqrt(a * a + 1)  # latents of variance one, of which v is the derivative
    images = {
        "epsilon": x - a * o,
        "v_prediction": unit / math.sqrt(a * a + 1) - o * a / math.sqrt(a * a + 1),
        "sample": o,
    }
    return x + (p - a) * (x - images[kind]) / a


RULES: dict[str, Callable[..., Any]] = {"ddim": guided_step, "euler": guided_euler_step}
STEPS = [("ddim", *levels) for levels in ALPHAS] + [("euler", *levels) for levels in SIGMAS]


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("rule, level, next_level", STEPS)
def test_step_loses_no_digits(each_backend: str, rule: str, level: float, next_level: float, kind: str) -> None:
    step = RULES[rule]
    cond, uncond, x = randn(*SHAPE), randn(*SHAPE), randn(*SHAPE)
    latents = step(cond, uncond, x, level, next_level, guidance=3.0, prediction_type=kind)
    output = uncond.double() + 3 * (cond.double() - uncond.double())
    exact = step_by_hand(rule, output, x, level, next_level, kind)
    absolute = 2e-6 * exact.abs().max().item()
    torch.testing.assert_close(latents.double(), exact, rtol=1e-6, atol=absolute)
    # The part that the output contributes, alone: a small difference of large terms if computed carelessly.
    part = step(cond, cond, 0 * x, level, next_level, guidance=1.0, prediction_type=kind)
    exact_part = step_by_hand(rule, cond, 0 * x, level, next_level, kind)
    torch.testing.assert_close(part.double(), exact_part, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("level", [1e-6, 0.3, 1.0 - 2**-20, 1.0])
def test_a_step_to_the_same_level_changes_nothing(each_backend: str, level: float) -> None:
    cond, uncond, x = randn(*SHAPE), randn(*SHAPE), randn(*SHAPE)
    assert torch.equal(guided_step(cond, uncond, x, level, level, guidance=5.0), x)
    assert torch.equal(guided_euler_step(cond, uncond, x, level, level, guidance=5.0), x)
    v = guided_step(cond, uncond, x, level, level, guidance=5.0, prediction_type="v_prediction")
    torch.testing.assert_close(v, x, rtol=3e-7, atol=0)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("rule", RULES)
def test_step_passes_gradcheck(rule: str, kind: str) -> None:
    step = RULES[rule]
    tensors = [randn(2, 2, 3, 2, dtype=torch.float64).requires_grad_() for _ in range(3)]
    levels = torch.tensor([0.3, 0.5], device=DEVICE), torch.tensor([0.6, 0.7], device=DEVICE)
    guidance = torch.tensor([2.0, 7.5], device=DEVICE)
    options: dict[str, Any] = {"guidance": guidance, "prediction_type": kind}
    assert torch.autograd.gradcheck(lambda *t: step(*t, *levels, **options), tensors)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_a_kernel_step_are_those_of_the_reference(rule: str) -> None:
    step = RULES[rule]
    tensors = [randn(*SHAPE, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    levels, cotangent = ((0.3, 0.6) if rule == "ddim" else (3.0, 1.5)), randn(*SHAPE).bfloat16()
    grads = []
    for name in ("reference", "triton"):
        with backend.force(name):
            grads.append(torch.autograd.grad(step(*tensors, *levels, guidance=3.0), tensors, cotangent))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("place", [0, 10, 28, 29])
def test_euler_step_equals_diffusers(each_backend: str, kind: str, place: int) -> None:
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, prediction_type=kind
    )
    scheduler.set_timesteps(30)
    sigma, next_sigma = scheduler.sigmas[place], scheduler.sigmas[place + 1]
    cond, uncond, x = randn(*SHAPE), randn(*SHAPE), randn(*SHAPE) * (sigma**2 + 1) ** 0.5
    given: dict[str, Any] = {"guidance": 3.0, "prediction_type": kind}
    mine = guided_euler_step(cond, uncond, x, sigma, next_sigma, **given)
    scheduler.scale_model_input(x, scheduler.timesteps[place])
    theirs = scheduler.step((uncond + 3.0 * (cond - uncond)).cpu(), scheduler.timesteps[place], x.cpu()).prev_sample
    torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_ddim_step_equals_diffusers(each_backend: str, kind: str) -> None:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, prediction_type=kind
    )
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps[[0, 9, 19]].tolist():
        alpha_prev = scheduler.alphas_cumprod[t - 50] if t >= 50 else scheduler.final_alpha_cumprod  # 1 at the end
        cond, uncond, x = randn(*SHAPE), randn(*SHAPE), randn(*SHAPE)
        alphas = scheduler.alphas_cumprod[t], alpha_prev
        mine = guided_step(cond, uncond, x, *alphas, guidance=3.0, prediction_type=kind)
        theirs = scheduler.step((uncond + 3.0 * (cond - uncond)).cpu(), t, x.cpu()).prev_sample
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=2e-5)


# --- registration -----------------------------------------------------------------------------------------------------


def add_noise_arguments() -> list[tuple]:
    t = torch.tensor([3, 999], device=DEVICE)
    x0, noise = randn(2, 4, 5, 7).requires_grad_(), randn(2, 4, 5, 7).transpose(2, 3).contiguous().transpose(2, 3)
    low = x0.detach().bfloat16(), noise.bfloat16()
    return [(x0, noise.requires_grad_(), t, table()), (*low, t[:1], table())]


def loss_arguments() -> list[tuple]:
    p, n, weights = randn(3, 4, 5, 7).requires_grad_(), randn(3, 4, 5, 7), torch.tensor([1.0, -2.0], device=DEVICE)
    alpha_B = torch.tensor([0.1, 0.5, 0.9], device=DEVICE)
    return [
        (p, n, None, integers(0, 1, 9), weights, [1.0], [None], 0),
        (p, n, n * 2, integers(0, 1, 9), weights, [0.0], [alpha_B], 1),
        (p.detach().half().requires_grad_(), None, n.half(), integers(0, 1, 1), weights, [1.0], [None], 2),
    ]


def step_arguments() -> list[tuple]:
    c, u, x = (randn(2, 4, 5, 7).requires_grad_() for _ in range(3))
    levels = [torch.tensor([v, v / 2], device=DEVICE) for v in (3.0, 0.7, 0.8)]
    return [
        (c, u, x, [3.0, 0.3, 0.5], [None, None, None], 0, 0),
        (c, u, x, [0.0, 0.0, 0.0], levels, 1, 1),
        (c, None, x, [1.0, 0.0, 0.5], [None, levels[1], None], 0, 2),
    ]


OPS = {
    "add_noise": (add_noise_op, add_noise_arguments),
    "weighted_noise_loss": (weighted_noise_loss_op, loss_arguments),
    "guided_step": (guided_step_op, step_arguments),
}


@pytest.mark.parametrize("name", OPS)
def test_registration_passes_opcheck(each_backend: str, name: str) -> None:
    op, arguments = OPS[name]
    for given in arguments():
        torch.library.opcheck(op, given)


def compiled_cases() -> dict[str, Callable[..., Tensor]]:
    t, alphas, weights = torch.tensor([3, 999], device=DEVICE), table(), torch.tensor([1.0, -2.0], device=DEVICE)
    levels = torch.tensor([0.3, 0.4], device=DEVICE), torch.tensor([0.5, 0.6], device=DEVICE)

    def noisy(x: Tensor, y: Tensor) -> Tensor:
        return add_noise(x, y, t, alphas) * add_noise(y, x, t, alphas)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        out = weighted_noise_loss(x, y, integers(0, 1), weights)
        return out.loss + out.found_inf

    def steps(x: Tensor, y: Tensor) -> Tensor:
        latents = guided_step(x, y, x * y, *levels, guidance=2.0)
        return latents.sum() + guided_euler_step(x, y, x, 2.0, 0.0, guidance=3.0).sum()

    return {"add_noise": noisy, "weighted_noise_loss": loss, "guided_step": steps}


@pytest.mark.parametrize("name", OPS)
def test_compile_goes_through_in_one_graph(each_backend: str, name: str) -> None:
    function = compiled_cases()[name]
    x, y = randn(2, 4, 9, 7).requires_grad_(), randn(2, 4, 9, 7)
    plain = function(x, y)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(compiled, plain)
    grads = [torch.autograd.grad(out.sum(), x)[0] for out in (plain, compiled)]
    torch.testing.assert_close(*grads)


def test_bytes_count_each_operand_once() -> None:
    specs = (ADD_NOISE, WEIGHTED_NOISE_LOSS, GUIDED_STEP)
    small = {spec.name: spec.bench(4096, torch.bfloat16, DEVICE) for spec in specs}
    latents = 4096 * 2
    assert ADD_NOISE.bytes_moved(small["add_noise"]) == 3 * latents + 8 + 4
    # Prediction and noise, an fp32 gradient, four set numbers, three weights.
    assert WEIGHTED_NOISE_LOSS.bytes_moved(small["weighted_noise_loss"]) == 2 * latents + 4096 * 4 + 4 * 8 + 3 * 4
    assert GUIDED_STEP.bytes_moved(small["guided_step"]) == 4 * latents
