"""KSCU and ESD against slow, literal versions of their equations, and what a run costs in U-Net evaluations."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace

import pytest
import torch
from tiny import tiny_backbone, tiny_prompts, tiny_rollout, tiny_unet
from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.denoisers.teacher import Teacher
from fastunlearn.errors import UserError
from fastunlearn.methods.esd import EsdConfig, beyond_anchor
from fastunlearn.methods.kscu import beyond_anchor as beyond_anchor_of_kscu
from fastunlearn.methods.tables import build_method
from fastunlearn.models.parameter_names import trainable_names
from fastunlearn.prompts.variants import PromptTable
from fastunlearn.sampling.batch import BatchLayout, GuidedPrediction
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.rollout import Rollout

STEP = KeyStep(update=0, concept=0, index=3, restart=True, continues=True)


def a_config(**fields: object) -> Config:
    return Config.model_validate({"concepts": ["neon style"], "evaluation": {"mode": "off"}} | fields)


def perturbed_models(prompt_table: PromptTable, prediction_type: str = "epsilon") -> tuple[Predictors, torch.nn.Module]:
    """A student that has moved away from its teacher, and the untouched original."""
    backbone = tiny_backbone(prompt_table, prediction_type)
    unet, original = backbone.unet, copy.deepcopy(backbone.unet)
    names = trainable_names(unet, "attn2")
    teacher = Teacher(unet, names, whole_copy=False)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name in names:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return Predictors(backbone, unet, unet, teacher), original


def literal(models: Predictors, unet: torch.nn.Module, x: Tensor, t: Tensor, embeds: object) -> Tensor:
    """One unbatched prediction, turned into noise by the definition of the prediction type."""
    out = models.backbone.predict(unet, x, t, embeds)  # type: ignore[arg-type]
    a = models.backbone.noise.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    return out if models.backbone.noise.prediction_type == "epsilon" else a.sqrt() * out + (1 - a).sqrt() * x


@pytest.mark.parametrize(
    ("concepts", "given", "noisy", "late"),
    [
        (["cat"], {}, 2.0, 2.0),
        (["neon style"], {}, 1.5, 0.0),
        (["cat", "neon style"], {}, 1.0, 1.0),
        (["cat"], {"negative_guidance": 0.0}, 0.0, 0.0),
        (["neon style"], {"negative_guidance": 0.5}, 0.5, 0.0),
        (["neon style"], {"negative_guidance_from": 0.0}, 1.5, 1.5),
        (["cat"], {"negative_guidance_from": 0.9}, 0.0, 0.0),
    ],
)
def test_kscu_goes_beyond_the_anchor_as_the_kind_needs_it(
    concepts: list[str], given: dict[str, float], noisy: float, late: float
) -> None:
    cfg = a_config(concepts=concepts, kscu=given)
    assert [beyond_anchor_of_kscu(cfg, noise) for noise in (0.8, 0.79)] == [noisy, late]


@pytest.mark.parametrize(
    ("settings", "decay"),
    [
        ({}, 0.9),
        ({"kscu": {"ema_decay": 0.0}}, None),
        ({"kscu": {"ema_decay": 0.5}}, 0.5),
        ({"zero": {"stage": 3}}, None),
        ({"model": {"cuda_graphs": True}, "zero": {"stage": 1}}, None),
        ({"meta": {"enabled": True}}, None),
    ],
)
def test_kscu_averages_its_weights_where_that_is_possible(settings: dict[str, object], decay: float | None) -> None:
    cfg = a_config(**settings)
    assert cfg.method_spec.average(cfg) == (None if decay is None else (decay, False))


def test_an_average_of_whole_weights_is_refused_where_no_rank_has_them() -> None:
    with pytest.raises(UserError, match=r"kscu\.ema_decay: not with zero\.stage 3"):
        a_config(kscu={"ema_decay": 0.9}, zero={"stage": 3})


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("uncond", [True, False])
def test_kscu_loss_equals_its_equations(prediction_type: str, uncond: bool) -> None:
    prompt_table = tiny_prompts()
    models, original = perturbed_models(prompt_table, prediction_type)
    weight = 0.5
    cfg = a_config(
        kscu={
            "uncond_gradient": uncond,
            "uncond_weight": weight,
            "negative_guidance": 1.5,
            "negative_guidance_from": 0,
        },
        train={"loss_weighting": "epsilon"},
    )
    rollout = tiny_rollout(models, prompt_table)
    rollout.restart(STEP)
    (window,) = rollout.batches(STEP, None)
    outcome = build_method(cfg).loss(models, window)

    x, t = window.latents, window.timesteps
    with torch.no_grad():
        e_c, e_0 = (literal(models, original, x, t, cond) for cond in (window.cond, window.uncond))
        s_c, s_0 = (literal(models, models.backbone.unet, x, t, cond) for cond in (window.cond, window.uncond))
        direction = e_c - e_0
        expected = ((s_c - (e_0 - 1.5 * direction)) ** 2).mean()
        if uncond:
            expected += weight * ((s_0 - (e_0 - (1000 - t).view(-1, 1, 1, 1) * 2e-5 * direction)) ** 2).mean()
    assert outcome.loss is not None
    assert torch.allclose(outcome.loss, expected, rtol=1e-4)
    assert outcome.guided is not None
    raw = [models.backbone.predict(models.backbone.unet, x, t, cond) for cond in (window.cond, window.uncond)]
    assert torch.allclose(outcome.guided.cond, raw[0], atol=1e-5) and torch.allclose(
        outcome.guided.uncond, raw[1], atol=1e-5
    )


def test_kscu_as_published_starts_at_twice_the_erased_direction() -> None:
    prompt_table = tiny_prompts()
    backbone = tiny_backbone(prompt_table)
    models = Predictors(backbone, backbone.unet, backbone.unet, Teacher(backbone.unet, [], whole_copy=True))
    rollout = tiny_rollout(models, prompt_table)
    rollout.restart(STEP)
    (window,) = rollout.batches(STEP, None)
    cond, uncond = models.frozen(window.latents, window.timesteps, window.cond, window.uncond)
    loss = (
        build_method(a_config(kscu={"negative_guidance": 1.0, "negative_guidance_from": 0})).loss(models, window).loss
    )
    assert loss is not None
    assert torch.allclose(loss, 4 * ((cond - uncond) ** 2).mean(), rtol=1e-4)


def test_the_unconditional_gradient_is_negligible_at_the_published_weight() -> None:
    """Why "auto" leaves it out: the ratio of the two gradients at the start of a run."""
    prompt_table = tiny_prompts()

    def gradient(uncond_weight: float, only: bool) -> Tensor:
        models, _ = perturbed_models(prompt_table)
        with torch.no_grad():  # back to the start: the student is the teacher
            for name, parameter in models.backbone.unet.named_parameters():
                if name in models.teacher.frozen:  # type: ignore[attr-defined]
                    parameter.copy_(models.teacher.frozen[name])  # type: ignore[attr-defined]
        rollout = tiny_rollout(models, prompt_table)
        rollout.restart(STEP)
        (window,) = rollout.batches(STEP, None)
        cfg = a_config(kscu={"uncond_gradient": only, "uncond_weight": uncond_weight})
        loss = build_method(cfg).loss(models, window).loss
        assert loss is not None
        loss.backward()
        return torch.cat([p.grad.flatten() for p in models.backbone.unet.parameters() if p.grad is not None])

    without, with_it = gradient(1e-4, only=False), gradient(1e-4, only=True)
    assert (with_it - without).norm() / without.norm() < 1e-5


def test_esd_loss_equals_its_equation() -> None:
    prompt_table = tiny_prompts()
    models, original = perturbed_models(prompt_table)
    cfg = a_config(method="esd", esd={"negative_guidance": 2.0})
    rollout = tiny_rollout(models, prompt_table)
    rollout.restart(STEP)
    (window,) = rollout.batches(STEP, None)
    loss = build_method(cfg).loss(models, window).loss
    assert loss is not None
    x, t = window.latents, window.timesteps
    with torch.no_grad():
        e_c, e_0 = (literal(models, original, x, t, cond) for cond in (window.cond, window.uncond))
        s_c = literal(models, models.backbone.unet, x, t, window.cond)
    assert torch.allclose(loss, ((s_c - (e_0 - 2.0 * (e_c - e_0))) ** 2).mean(), rtol=1e-4)


def test_the_teacher_never_moves_and_the_student_is_left_alone() -> None:
    prompt_table = tiny_prompts()
    models, original = perturbed_models(prompt_table)
    x, embeds = torch.randn(2, 4, 8, 8), models.backbone.embeds.select([1, 1])
    before = {name: tensor.clone() for name, tensor in models.backbone.unet.state_dict().items()}
    times = models.noise.expand(500, len(x))
    (frozen,) = models.frozen(x, times, embeds)
    with torch.no_grad():
        assert torch.equal(frozen, models.backbone.predict(original, x, times, embeds))
    assert not frozen.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in models.backbone.unet.state_dict().items())


PUBLISHED: dict[str, dict] = {"sampler": {"num_inference_steps": 50}, "kscu": {"start": "published"}}


def count_run(cfg: Config, batch: int = 1) -> dict[str, int]:
    """Walk a whole table with a U-Net that costs nothing; the counts are those of a real run."""
    prompt_table = tiny_prompts([concept.name for concept in cfg.concepts])
    backbone = tiny_backbone(prompt_table)

    def free(sample: Tensor, *_: object, **__: object) -> tuple[Tensor]:
        return (sample * 0.1,)

    models = Predictors(backbone, free, free, free)
    rollout: Rollout = tiny_rollout(models, prompt_table, BatchLayout(0, 1, batch, 1))
    method = build_method(cfg)
    for step in method.table():
        if step.restart:
            rollout.restart(step)
        pairs: list[GuidedPrediction] = []
        for window in rollout.batches(step, method.augmentation(step)):
            pair = method.loss(models, window).guided
            pairs += [pair] if pair is not None else []
        if step.continues:
            rollout.advance(step, pairs)
    return asdict(models.evaluations) | {"total": models.evaluations.total}


def test_a_style_run_of_500_updates_stays_within_its_budget() -> None:
    counts = count_run(a_config(**PUBLISHED))
    assert counts["total"] <= 3600
    assert counts == {
        "teacher": 1000,  # one batched pair per update
        "rollout": 2 * 496 + 480 + 23,  # restarts; the unconditional half of each advance; the tail's clean prompts
        "student_forward": 500,
        "student_backward": 500,
        "probe": 0,
        "total": counts["total"],
    }


def test_the_counts_scale_with_the_batch_and_the_switch_costs_what_it_says() -> None:
    short = PUBLISHED | {"train": {"max_train_steps": 60}, "prompts": {"augment_fraction": 0.0}}
    one, four = count_run(a_config(**short)), count_run(a_config(**short), batch=4)
    assert four == {name: 4 * value for name, value in one.items()}
    both = count_run(a_config(**short | {"kscu": PUBLISHED["kscu"] | {"uncond_gradient": True}}))
    assert both["student_backward"] == 120 and both["teacher"] == 180
    assert both["rollout"] == one["rollout"] - 57  # the advances are free altogether: 60 updates, 3 traversals


def test_trajectories_do_not_depend_on_how_they_are_spread() -> None:
    prompt_table = tiny_prompts(["neon style"], templates=["{concept}", "a picture in {concept}"])

    def latents(*layouts: BatchLayout) -> Tensor:
        unet = tiny_unet()
        parts: dict[int, Tensor] = {}
        for layout in layouts:
            backbone = tiny_backbone(prompt_table, unet=unet)
            rollout = tiny_rollout(Predictors(backbone, unet, unet, unet), prompt_table, layout, steps=10)
            rollout.restart(KeyStep(5, 0, 4, restart=True, continues=False))
            parts |= dict(zip(layout.global_sample_ids(), rollout.latents, strict=True))
        return torch.stack([parts[number] for number in sorted(parts)])

    whole = latents(BatchLayout(0, 1, 4, 1))
    assert torch.allclose(whole, latents(BatchLayout(0, 2, 2, 1), BatchLayout(1, 2, 2, 1)), atol=1e-5)
    assert torch.allclose(whole, latents(BatchLayout(0, 2, 1, 2), BatchLayout(1, 2, 1, 2)), atol=1e-5)
    assert torch.equal(whole, latents(BatchLayout(0, 1, 4, 1)))


@pytest.mark.parametrize("theirs", [1.0, 3.0])
def test_esd_in_the_published_convention_is_one_less_in_ours(theirs: float) -> None:
    published = EsdConfig(negative_guidance=theirs, guidance_convention="published")
    assert beyond_anchor(published) == beyond_anchor(EsdConfig(negative_guidance=theirs - 1))
    concept, anchor = torch.randn(2, 3, dtype=torch.float64)
    g = beyond_anchor(published)
    torch.testing.assert_close(anchor - g * (concept - anchor), concept - theirs * (concept - anchor))


def test_a_published_guidance_below_the_anchor_is_refused() -> None:
    with pytest.raises(UserError, match=r"esd.negative_guidance: 0.5 .* does not reach the anchor"):
        a_config(method="esd", esd={"negative_guidance": 0.5, "guidance_convention": "published"})


@pytest.mark.parametrize("method", ["kscu", "esd", "sdd"])
@pytest.mark.parametrize("weighting", ["epsilon", "prediction"])
def test_the_loss_of_a_v_model_is_between_what_was_chosen(method: str, weighting: str) -> None:
    """An oracle in fp64: noise estimates of v count alpha-bar of each sample, its own outputs all alike."""
    prompt_table = tiny_prompts()
    backbone = tiny_backbone(prompt_table, "v_prediction")
    original, student = backbone.unet, copy.deepcopy(backbone.unet)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    models = Predictors(
        backbone, student, student, Teacher(original, trainable_names(original, "full"), whole_copy=True)
    )
    rollout = tiny_rollout(models, prompt_table, BatchLayout(0, 1, 2, 1))
    rollout.restart(STEP)
    (window,) = rollout.batches(STEP, None)
    window = replace(window, timesteps=torch.tensor([1, 701]))
    x, t = window.latents, window.timesteps
    cfg = a_config(
        method=method, train={"loss_weighting": weighting}, kscu={"negative_guidance": 1.0, "negative_guidance_from": 0}
    )
    loss = build_method(cfg).loss(models, window).loss
    assert loss is not None
    with torch.no_grad():
        aim = student if method == "sdd" else original
        v_c, v_a = (backbone.predict(aim, x, t, cond).double() for cond in (window.cond, window.anchor))
        s_c = backbone.predict(student, x, t, window.cond).double()
    target = v_a if method == "sdd" else v_a - (v_c - v_a)
    weights = models.noise.alpha_bar(t).double() if weighting == "epsilon" else torch.ones(2).double()
    expected = (weights * (s_c - target).square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-4, atol=1e-9)
    assert float(models.noise.alpha_bar(t)[0] / models.noise.alpha_bar(t)[1]) > 10
