"""The noise process against diffusers' schedulers, and against its formulas in fp64 at mixed timesteps."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from tiny import tiny_scheduler

from fastunlearn.models.noise_process import NoiseProcess

CPU = torch.device("cpu")
KINDS = ["epsilon", "v_prediction", "sample"]
TIMES = torch.tensor([1, 501, 981])


def process(kind: str) -> NoiseProcess:
    return NoiseProcess(tiny_scheduler(kind), CPU)


def a_case(kind: str) -> tuple[NoiseProcess, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(process, x0, n, x, the true prediction), each (3, 4, 8, 8) in fp64 but for the process."""
    noise = process(kind)
    draw = torch.Generator().manual_seed(0)
    clean, eps = (torch.randn(3, 4, 8, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    a = noise.alphas_cumprod[TIMES].double().view(-1, 1, 1, 1)
    noisy = a.sqrt() * clean + (1 - a).sqrt() * eps
    truth = {"epsilon": eps, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * clean, "sample": clean}[kind]
    return noise, clean, eps, noisy, truth


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_agree_with_their_formulas(kind: str) -> None:
    noise, clean, eps, noisy, truth = a_case(kind)
    torch.testing.assert_close(noise.add_noise(clean, eps, TIMES), noisy)
    torch.testing.assert_close(noise.target(eps, clean, TIMES), truth, rtol=1e-6, atol=1e-6)
    # alpha-bar is fp32, and at t = 1 it divides by what is left of the noise
    torch.testing.assert_close(noise.to_epsilon(truth, noisy, TIMES).double(), eps, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(noise.to_x0(truth, noisy, TIMES).double(), clean, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_the_true_prediction_stays_on_the_ray(kind: str, sampler: str) -> None:
    noise, clean, eps, noisy, truth = a_case(kind)
    after = noise.levels(TIMES, 50)[1].double()
    if sampler == "euler":
        after[0] = 1.0  # from timestep 1 there is one step to no noise at all
    a = after.view(-1, 1, 1, 1)
    found = noise.step(truth, truth, noisy, TIMES, 50, 3.0, sampler)
    torch.testing.assert_close(found, a.sqrt() * clean + (1 - a).sqrt() * eps, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_euler_walks_as_diffusers_does(kind: str) -> None:
    """A whole guided trajectory of 20 steps, with a prediction that depends on the latents."""
    noise = process(kind)
    theirs = EulerDiscreteScheduler.from_config(noise.scheduler.config)
    theirs.set_timesteps(20)
    times = noise.timesteps(20)
    assert theirs.timesteps.tolist() == times
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(2, 4, 8, 8, generator=draw)
    ours, other = start.clone(), start * (float(theirs.sigmas[0]) ** 2 + 1) ** 0.5

    def predicted(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 0.9 * latents + 0.1 * latents.roll(1, -1), 0.8 * latents - 0.05

    for index, time in enumerate(theirs.timesteps):
        cond, uncond = predicted(ours)
        ours = noise.step(cond, uncond, ours, noise.expand(times[index], 2), 20, 3.0, "euler")
        cond, uncond = predicted(theirs.scale_model_input(other, time))
        other = theirs.step(uncond + 3.0 * (cond - uncond), time, other).prev_sample
    torch.testing.assert_close(ours, other, rtol=2e-4, atol=2e-4)


def v_config(**options: object) -> dict[str, object]:
    """Without diffusers' note of which fields were left to their defaults: it would ignore the options."""
    config = tiny_scheduler("v_prediction").config
    return {name: value for name, value in config.items() if not name.startswith("_")} | options


@pytest.mark.parametrize("steps", [20, 30])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_euler_walks_a_trailing_schedule_as_diffusers_does(zero_snr: bool, steps: int) -> None:
    """Also where it begins in pure noise, and where the steps are not equally long."""
    options = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": zero_snr}
    config = v_config(**options)
    noise = NoiseProcess(DDIMScheduler.from_config(config), CPU)
    theirs = EulerDiscreteScheduler.from_config(config)
    theirs.set_timesteps(steps)
    assert (float(noise.alphas_cumprod[-1]) < 1e-7) == zero_snr
    assert theirs.timesteps.tolist() == noise.timesteps(steps) and noise.timesteps(steps)[0] == 999
    ours = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    other = ours * (float(theirs.sigmas[0]) ** 2 + 1) ** 0.5
    for time in theirs.timesteps:
        ours = noise.step(0.9 * ours, 0.8 * ours - 0.05, ours, noise.expand(int(time), 2), steps, 3.0, "euler")
        scaled = theirs.scale_model_input(other, time)
        guided = 0.8 * scaled - 0.05 + 3.0 * (0.1 * scaled + 0.05)
        other = theirs.step(guided, time, other).prev_sample
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-3)


def test_the_clean_latents_of_a_v_model_are_finite_where_nothing_but_noise_is_left() -> None:
    config = v_config(rescale_betas_zero_snr=True)
    noise = NoiseProcess(DDIMScheduler.from_config(config), CPU)
    clean, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    last = noise.expand(999, 1)
    assert float(noise.alpha_bar(last)) < 1e-7
    x = noise.add_noise(clean, eps, last)
    torch.testing.assert_close(noise.to_x0(noise.target(eps, clean, last), x, last), clean, rtol=1e-3, atol=1e-3)


def test_ddim_and_euler_differ_in_the_last_step_only() -> None:
    noise = process("epsilon")
    draw = torch.Generator().manual_seed(2)
    cond, uncond, latents = (torch.randn(1, 4, 8, 8, generator=draw) for _ in range(3))
    times = noise.timesteps(10)
    for time in (times[0], times[-2]):
        pair = [noise.step(cond, uncond, latents, noise.expand(time, 1), 10, 3.0, name) for name in ("ddim", "euler")]
        torch.testing.assert_close(pair[0], pair[1], rtol=1e-4, atol=1e-4)
    last = [noise.step(cond, uncond, latents, noise.expand(times[-1], 1), 10, 3.0, name) for name in ("ddim", "euler")]
    assert not torch.allclose(last[0], last[1], rtol=1e-4, atol=1e-4)


def test_timesteps_leave_the_scheduler_alone() -> None:
    noise = process("epsilon")
    before = noise.scheduler.timesteps.clone()
    assert noise.timesteps(50)[0] == 981 and noise.timesteps(10)[0] == 901
    assert torch.equal(noise.scheduler.timesteps, before)
    assert noise.expand(7, 3).tolist() == [7, 7, 7] and noise.expand(7, 0).shape == (0,)
