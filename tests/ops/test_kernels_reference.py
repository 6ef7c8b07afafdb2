"""The reference ops against formulas written out by hand in fp64, and against diffusers' schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from fastunlearn_kernels import (
    PREDICTION_TYPES,
    add_noise,
    apply_guidance,
    ddim_step,
    guided_noise_loss,
    guided_step,
    to_epsilon,
)

SHAPES = [(1, 4, 8, 8), (3, 4, 16, 16), (5, 3, 7, 13), (2, 1, 1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUIDANCE, UNCOND_WEIGHT = 1.5, 0.3


def predictions(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, count: int = 5) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(count)]


def slopes(batch: int) -> Tensor:
    """lambda1, one per sample, as fp64."""
    return torch.linspace(0.006, 0.02, batch, dtype=torch.float64)


def loss_by_hand(tensors: list[Tensor], slope_B: Tensor) -> Tensor:
    """The formula, sample by sample, in fp64."""
    total = torch.zeros((), dtype=torch.float64)
    for b in range(tensors[0].shape[0]):
        s_c, s_0, e_c, e_a, e_0 = (t[b].double() for t in tensors)
        cond_error = s_c - (e_a - GUIDANCE * (e_c - e_a))
        uncond_error = s_0 - (e_0 - slope_B[b].double() * (e_c - e_a))
        total = total + (cond_error**2).mean() + UNCOND_WEIGHT * (uncond_error**2).mean()
    return total / tensors[0].shape[0]


def parts_of(tensors: list[Tensor], slope_B: Tensor) -> tuple[Tensor, Tensor]:
    loss, per_sample_B, _ = guided_noise_loss(
        *tensors, guidance=GUIDANCE, lambda1_B=slope_B, uncond_weight=UNCOND_WEIGHT
    )
    return loss, per_sample_B


def loss_of(tensors: list[Tensor], slope_B: Tensor) -> Tensor:
    return parts_of(tensors, slope_B)[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_equals_the_formula_in_fp64(shape: tuple[int, ...]) -> None:
    tensors, slope = predictions(shape), slopes(shape[0])
    loss = loss_of(tensors, slope)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, loss_by_hand(tensors, slope), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_computed_in_fp32_whatever_comes_in(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors, slope = predictions(shape, dtype), slopes(shape[0])
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    loss = loss_of(tensors, slope.float())
    grads = torch.autograd.grad(loss, tensors[:2])

    exact = [t.detach().double() for t in tensors]
    for tensor in exact[:2]:
        tensor.requires_grad_()
    expected = loss_by_hand(exact, slope.float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    for grad, reference in zip(grads, torch.autograd.grad(expected, exact[:2]), strict=True):
        assert grad.dtype == dtype
        # Rounded once, at the end: fp32 arithmetic, then one rounding to the dtype of the input.
        torch.testing.assert_close(grad.double(), reference, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-7)


def test_gradcheck() -> None:
    tensors, slope = predictions((3, 2, 3, 5)), slopes(3)
    students = [t.requires_grad_() for t in tensors[:2]]
    assert torch.autograd.gradcheck(lambda c, u: loss_of([c, u, *tensors[2:]], slope) * 2.5, students)


def test_no_gradient_reaches_the_teacher() -> None:
    tensors, slope = predictions((2, 4, 5, 5)), slopes(2)
    for tensor in tensors:
        tensor.requires_grad_()
    loss, parts = parts_of(tensors, slope)
    assert not parts.requires_grad
    loss.backward()
    assert [t.grad is not None for t in tensors] == [True, True, False, False, False]


def test_batch_permutation_permutes_the_parts_and_keeps_the_loss() -> None:
    tensors, slope = predictions((4, 4, 7, 9)), slopes(4)
    loss, parts = parts_of(tensors, slope)
    order = torch.tensor([2, 0, 3, 1])
    loss_2, parts_2 = parts_of([t[order] for t in tensors], slope[order])
    torch.testing.assert_close(loss, loss_2, rtol=1e-14, atol=0)
    assert torch.equal(parts[order], parts_2)


def test_loss_repeats_bit_for_bit() -> None:
    tensors, slope = predictions((3, 4, 32, 32), torch.float32), slopes(3)
    assert torch.equal(loss_of(tensors, slope), loss_of(tensors, slope))


def test_layout_in_memory_does_not_matter() -> None:
    tensors, slope = predictions((2, 4, 6, 10)), slopes(2)
    strided = [t.to(memory_format=torch.channels_last) for t in tensors]
    torch.testing.assert_close(loss_of(strided, slope), loss_of(tensors, slope), rtol=1e-13, atol=0)


def test_without_the_unconditional_branch_only_the_conditional_term_is_left() -> None:
    s_c, _, e_c, e_a, _ = predictions((2, 4, 5, 5))
    loss, *_ = guided_noise_loss(s_c, None, e_c, e_a, None, guidance=1.0, uncond_weight=7.0)
    torch.testing.assert_close(loss, ((s_c - 2 * e_a + e_c) ** 2).mean())


def test_loss_is_zero_on_target() -> None:
    _, _, e_c, e_a, e_0 = predictions((2, 4, 5, 5))
    direction = e_c - e_a
    loss, *_ = guided_noise_loss(
        e_a - 2 * direction, e_0 - 0.01 * direction, e_c, e_a, e_0, guidance=2.0, lambda1_B=0.01, uncond_weight=1.0
    )
    assert loss < 1e-30


def test_loss_refuses_what_does_not_fit() -> None:
    s_c, s_0, e_c, e_a, e_0 = predictions((2, 4, 5, 5))
    with pytest.raises(ValueError, match="teacher_anchor has shape"):
        guided_noise_loss(s_c, s_0, e_c, e_a[:1], e_0, guidance=1.0)
    with pytest.raises(ValueError, match="uncond needs teacher_uncond"):
        guided_noise_loss(s_c, s_0, e_c, e_a, None, guidance=1.0)
    with pytest.raises(ValueError, match="expected 1 or 2 coefficients, got 3"):
        guided_noise_loss(s_c, s_0, e_c, e_a, e_0, guidance=1.0, lambda1_B=torch.ones(3))
    with pytest.raises(ValueError, match="float32 or float64"):
        guided_noise_loss(s_c, s_0, e_c, e_a, e_0, guidance=1.0, lambda1_B=torch.ones(2, dtype=torch.bfloat16))


def sdxl_schedule(prediction_type: str) -> DDIMScheduler:
    """SDXL's training schedule as a deterministic DDIM sampler."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    scheduler.set_timesteps(50)
    return scheduler


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_step_equals_diffusers(prediction_type: str) -> None:
    scheduler = sdxl_schedule(prediction_type)
    stride = scheduler.config.num_train_timesteps // 50
    for t in scheduler.timesteps[[0, 14, 24, 40, 49]].tolist():
        cond, uncond, latents = predictions((3, 4, 9, 7), torch.float64, 3)
        previous = t - stride
        alpha_prev = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        alphas = scheduler.alphas_cumprod[t], alpha_prev
        mine = guided_step(cond, uncond, latents, *alphas, guidance=3.0, prediction_type=prediction_type)
        theirs = scheduler.step(uncond + 3.0 * (cond - uncond), t, latents).prev_sample
        # diffusers keeps its coefficients in fp32: 1e-7 relative, times about 1/sqrt(alpha-bar) at the noisy end.
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_step_with_the_true_prediction_stays_on_the_ray(prediction_type: str) -> None:
    image, noise = predictions((2, 4, 6, 6), torch.float64, 2)
    a, p = 0.3, 0.7
    truth = {"epsilon": noise, "v_prediction": a**0.5 * noise - (1 - a) ** 0.5 * image, "sample": image}
    latents = a**0.5 * image + (1 - a) ** 0.5 * noise
    step = ddim_step(truth[prediction_type], latents, a, p, prediction_type)
    torch.testing.assert_close(step, p**0.5 * image + (1 - p) ** 0.5 * noise)
    torch.testing.assert_close(to_epsilon(truth[prediction_type], latents, a, prediction_type), noise)


def test_coefficients_may_differ_per_sample() -> None:
    output, latents = predictions((3, 4, 5, 5), torch.float64, 2)
    a, p = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.6, 0.95])
    rows = [ddim_step(output[b : b + 1], latents[b : b + 1], a[b], p[b], "v_prediction") for b in range(3)]
    assert torch.equal(ddim_step(output, latents, a, p, "v_prediction"), torch.cat(rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_rounds_once(dtype: torch.dtype) -> None:
    cond, uncond, latents = predictions((2, 4, 9, 5), dtype, 3)
    step = guided_step(cond, uncond, latents, 0.2, 0.25, guidance=3.0)
    exact = guided_step(cond.double(), uncond.double(), latents.double(), 0.2, 0.25, guidance=3.0)
    assert step.dtype == dtype
    torch.testing.assert_close(step.double(), exact, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-5)
    assert apply_guidance(cond, uncond, 3.0).dtype == torch.float32


def test_epsilon_passes_through_and_an_unknown_type_is_refused() -> None:
    output, latents = predictions((2, 4, 5, 5), torch.bfloat16, 2)
    assert to_epsilon(output, latents, 0.5, "epsilon") is output
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon, v_prediction, sample; got 'eps'"):
        to_epsilon(output, latents, 0.5, "eps")


@pytest.mark.parametrize("shape", SHAPES)
def test_add_noise_equals_diffusers(shape: tuple[int, ...]) -> None:
    table = sdxl_schedule("epsilon").alphas_cumprod
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x0, noise = predictions(shape, torch.float32, 2)
    timesteps = torch.randint(0, 1000, (shape[0],))
    torch.testing.assert_close(add_noise(x0, noise, timesteps, table), scheduler.add_noise(x0, noise, timesteps))


def test_add_noise_in_bf16_keeps_small_noise_levels() -> None:
    table = sdxl_schedule("epsilon").alphas_cumprod
    x0, noise = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16), torch.ones(1, 4, 8, 8, dtype=torch.bfloat16)
    expected = (1 - table[1].double()).sqrt().item()
    assert add_noise(x0, noise, torch.tensor([1]), table).double().mean().item() == pytest.approx(expected, rel=4e-3)
    with pytest.raises(ValueError, match="float32 or float64"):
        add_noise(x0, noise, torch.tensor([1]), table.bfloat16())
