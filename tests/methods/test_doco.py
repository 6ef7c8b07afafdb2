"""DoCo against slow, literal versions of its equations: losses, whose gradient goes where, and its state."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from surgery_case import the_prompts
from tiny import tiny_backbone
from torch import Tensor

from fastunlearn.acceleration.attention import stop_first_token_gradient
from fastunlearn.config import Config
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.denoisers.teacher import Teacher
from fastunlearn.errors import UserError
from fastunlearn.methods.doco import DoCo
from fastunlearn.methods.parts.discriminator import Discriminator, DiscriminatorTrainer, bce_to
from fastunlearn.methods.tables import build_method
from fastunlearn.models.noise_process import NoiseProcess
from fastunlearn.models.parameter_names import trainable_names
from fastunlearn.prompts.variants import PromptPair, PromptTable
from fastunlearn.sampling.anchor_sampler import AnchorSampler
from fastunlearn.sampling.batch import BatchLayout, UnlearnBatch
from fastunlearn.sampling.image_pool import LatentPool

ANCHORS = ["a cat", "a tree"]


def a_config(**doco: object) -> Config:
    fields = {"discriminator_warmup": 2} | doco
    return Config.model_validate(
        {
            "method": "doco",
            "concepts": [{"name": "neon style", "anchor": "plain style"}],
            "train": {"max_train_steps": 6, "train_batch_size": 3},
            "doco": fields,
        }
    )


def a_book() -> PromptTable:
    return PromptTable([[PromptPair(f"{anchor} in neon style", anchor) for anchor in ANCHORS]], [[]])


def the_parts(cfg: Config) -> tuple[Predictors, AnchorSampler, DoCo]:
    prompt_table = a_book()
    backbone = tiny_backbone(prompt_table)
    names = trainable_names(backbone.unet, "attn2_kv")
    teacher = Teacher(backbone.unet, names, whole_copy=True)
    with torch.no_grad():
        for name, parameter in backbone.unet.named_parameters():
            if name in names:
                parameter.add_(0.05 * torch.randn_like(parameter))
    models = Predictors(backbone, backbone.unet, backbone.unet, teacher)
    pool = LatentPool(torch.randn(5, 4, 8, 8), [ANCHORS[i % 2] for i in range(5)])
    windows = AnchorSampler(cfg, models, prompt_table, BatchLayout(0, 1, cfg.train.train_batch_size, 1), pool)
    method = build_method(cfg)
    assert isinstance(method, DoCo)
    return models, windows, method


def the_window(windows: AnchorSampler, method: DoCo, update: int) -> UnlearnBatch:
    (window,) = windows.batches(method.table()[update], None)
    return window


def estimate_by_hand(models: Predictors, prediction: Tensor, window: UnlearnBatch) -> Tensor:
    assert isinstance(window.timesteps, Tensor)
    rows = []
    for row, t in enumerate(window.timesteps.tolist()):
        a = models.backbone.noise.scheduler.alphas_cumprod[t]
        rows.append((window.latents[row] - (1 - a).sqrt() * prediction[row]) / a.sqrt())
    return torch.stack(rows)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("discriminator", ["timestep", "conditional", "released"])
def test_losses_equal_their_equations(guidance: float, discriminator: str) -> None:
    models, windows, method = the_parts(a_config(guidance_scale=guidance, discriminator=discriminator))
    window = the_window(windows, method, 3)
    outcome = method.loss(models, window)
    judge = method.discriminator
    assert judge is not None and outcome.loss is not None and isinstance(window.timesteps, Tensor)
    with torch.no_grad():
        u = models.backbone.predict(models.backbone.unet, window.latents, window.timesteps, window.cond)
        (a,) = models.frozen(window.latents, window.timesteps, window.anchor)
        (n,) = models.frozen(window.latents, window.timesteps, window.uncond)
        u, a = guidance * u + (1 - guidance) * n, guidance * a + (1 - guidance) * n
        estimates = [estimate_by_hand(models, prediction, window) for prediction in (u, a)]
        if discriminator == "conditional":
            estimates = [torch.cat([estimate, window.latents], dim=1) for estimate in estimates]
        concept, anchor = (judge.network(estimate, window.timesteps) for estimate in estimates)
    torch.testing.assert_close(outcome.loss.detach(), torch.nn.functional.softplus(concept).mean())
    expected = torch.nn.functional.softplus(-concept).mean() + torch.nn.functional.softplus(anchor).mean()
    torch.testing.assert_close(method.discriminator_losses[0], expected)


def test_guidance_costs_one_more_frozen_evaluation_a_sample() -> None:
    counts = {}
    for scale in (1.0, 4.0):
        models, windows, method = the_parts(a_config(guidance_scale=scale))
        method.loss(models, the_window(windows, method, 3))
        counts[scale] = models.evaluations.total
    assert counts[4.0] - counts[1.0] == 3


def test_the_students_backward_leaves_no_gradient_in_the_discriminator() -> None:
    """Published code adds it to the discriminator's next step, against its purpose."""
    models, windows, method = the_parts(a_config())
    window = the_window(windows, method, 3)
    outcome = method.loss(models, window)
    judge = method.discriminator
    assert judge is not None and outcome.loss is not None
    before = [p.grad.clone() for p in judge.network.parameters() if p.grad is not None]
    outcome.loss.backward()
    after = [p.grad for p in judge.network.parameters() if p.grad is not None]
    assert before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(p.grad is not None and bool(p.grad.any()) for p in models.backbone.unet.parameters())


def test_warming_up_trains_the_discriminator_only() -> None:
    models, windows, method = the_parts(a_config())
    window = the_window(windows, method, 0)
    assert not window.trains
    outcome = method.loss(models, window)
    assert outcome.loss is None and method.discriminator is not None
    start = copy.deepcopy(method.discriminator.network.state_dict())
    figures = method.finish()
    assert figures["discriminator_loss"] > 0
    assert any(not torch.equal(start[name], value) for name, value in method.discriminator.network.state_dict().items())
    assert all(p.grad is None for p in models.backbone.unet.parameters())
    assert models.evaluations.student_backward == 0


def test_a_discriminator_learns_to_tell_two_clouds_apart_and_is_restored() -> None:
    judge = DiscriminatorTrainer(4, 16, torch.device("cpu"), released=False, learning_rate=1e-3, seed=0)
    times = torch.tensor([10, 500, 900, 990])
    for _ in range(40):
        judge.discriminator_loss(torch.randn(4, 4, 16, 16) + 0.5, torch.randn(4, 4, 16, 16) - 0.5, times, 1.0)
        judge.step()
    probe = torch.randn(4, 4, 16, 16)
    with torch.no_grad():
        assert (
            bce_to(judge.network(probe + 0.5, times), 1.0) < 0.2
            and bce_to(judge.network(probe - 0.5, times), 0.0) < 0.2
        )
    other = DiscriminatorTrainer(4, 16, torch.device("cpu"), released=False, learning_rate=1e-3, seed=1)
    other.load_state_dict(copy.deepcopy(judge.state_dict()))
    for one in (judge, other):
        one.discriminator_loss(probe, -probe, times, 1.0)
        one.step()
    same = zip(judge.network.parameters(), other.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


@pytest.mark.parametrize("size", [8, 16, 64, 128])
@pytest.mark.parametrize("released", [False, True])
def test_the_discriminator_fits_every_latent_size(size: int, released: bool) -> None:
    network = Discriminator(4, size, released=released, seed=0)
    logits = network(torch.randn(2, 4, size, size), torch.tensor([1, 999]))
    assert logits.dim() == 4 and logits.shape[2] >= 1 and bool(logits.isfinite().all())
    if released and size == 64:  # the published network, with its number of parameters
        assert logits.shape[2:] == (3, 3) and sum(p.numel() for p in network.parameters()) == 2_767_553


def test_image_estimate_recovers_the_picture_from_the_true_noise() -> None:
    models, windows, method = the_parts(a_config())
    window = the_window(windows, method, 3)
    assert isinstance(window.timesteps, Tensor)
    picture, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    a = models.backbone.noise.scheduler.alphas_cumprod[window.timesteps].view(-1, 1, 1, 1)
    noisy = a.sqrt() * picture + (1 - a).sqrt() * noise
    torch.testing.assert_close(models.noise.to_x0(noise, noisy, window.timesteps), picture, rtol=1e-3, atol=1e-4)


def test_key_timesteps_come_from_the_samplers_tail() -> None:
    _, windows, method = the_parts(a_config(timesteps="key"))
    step = method.table()[3]
    allowed = set(windows.timesteps[step.index :])
    for update in range(6):
        (window,) = windows.batches(method.table()[update], None)
        assert isinstance(window.timesteps, Tensor) and set(window.timesteps.tolist()) <= allowed


def test_timesteps_begin_at_the_smallest_one_allowed() -> None:
    cfg = a_config(min_timestep=700, discriminator_warmup=0)
    _, windows, method = the_parts(cfg)
    drawn: list[int] = []
    for update in range(200):
        (window,) = windows.batches(replace(method.table()[0], update=update), None)
        assert isinstance(window.timesteps, torch.Tensor)
        drawn += window.timesteps.tolist()
    assert 700 <= min(drawn) < 705 and 994 < max(drawn) < 1000
    with pytest.raises(UserError, match=r"^doco\.min_timestep: 5 is for uniform timesteps"):
        a_config(min_timestep=5, timesteps="key")


def test_a_batch_does_not_depend_on_how_it_is_spread() -> None:
    cfg = a_config()
    models, _, method = the_parts(cfg)
    pool = LatentPool(torch.randn(5, 4, 8, 8), [ANCHORS[i % 2] for i in range(5)])
    step = method.table()[4]
    (whole,) = AnchorSampler(cfg, models, a_book(), BatchLayout(0, 1, 4, 1), pool).batches(step, None)
    parts = [
        next(AnchorSampler(cfg, models, a_book(), BatchLayout(r, 2, 2, 1), pool).batches(step, None)) for r in (0, 1)
    ]
    assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))
    assert torch.equal(whole.cond.hidden, torch.cat([part.cond.hidden for part in parts]))


def test_no_gradient_passes_through_the_first_token() -> None:
    backbone = tiny_backbone(the_prompts())
    keys = [name for name, _ in backbone.unet.named_modules() if name.endswith("attn2.to_k")]
    assert stop_first_token_gradient(backbone.unet) == 2 * len(keys) > 0
    embeds = backbone.embeds.select([1])
    hidden = embeds.hidden.clone().requires_grad_()
    out = backbone.predict(
        backbone.unet, torch.randn(1, 4, 8, 8), torch.tensor([500]), type(embeds)(hidden, embeds.pooled)
    )
    out.square().sum().backward()
    assert hidden.grad is not None
    assert not bool(hidden.grad[:, 0].any()) and bool(hidden.grad[:, 1:].any())


def test_a_v_model_of_zero_terminal_snr_is_finite_at_pure_noise() -> None:
    models, windows, method = the_parts(a_config())
    scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False)
    models.backbone.noise = NoiseProcess(scheduler, torch.device("cpu"))
    window = replace(the_window(windows, method, 3), timesteps=torch.tensor([999, 999, 998]))
    assert models.noise.alpha_bar(window.timesteps)[0] == 0
    outcome = method.loss(models, window)
    assert outcome.loss is not None and bool(outcome.loss.isfinite())
    outcome.loss.backward()
    method.finish()
    judge = method.discriminator
    assert judge is not None and judge.guard.skipped == 0
    assert all(bool(p.isfinite().all()) for p in judge.network.parameters())


def test_a_gradient_of_the_discriminator_that_is_not_finite_is_skipped_and_counted() -> None:
    judge = DiscriminatorTrainer(4, 8, torch.device("cpu"), released=False, learning_rate=1e-3, seed=0, max_skipped=2)
    images, times = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    before = copy.deepcopy(judge.network.state_dict())
    judge.discriminator_loss(images * torch.nan, images, times, 1.0)
    judge.step()
    assert judge.guard.skipped == 1 and all(torch.equal(before[k], v) for k, v in judge.network.state_dict().items())
    judge.load_state_dict(copy.deepcopy(judge.state_dict()))
    judge.discriminator_loss(images * torch.nan, images, times, 1.0)
    with pytest.raises(UserError, match=r"discriminator's gradient was not finite in 2 updates in a row"):
        judge.step()
    judge.optimizer.zero_grad()
    judge.discriminator_loss(images, images, times, 1.0)
    judge.step()
    assert judge.guard.in_a_row == 0 and any(
        not torch.equal(before[k], v) for k, v in judge.network.state_dict().items()
    )
