"""SDD: its loss and its running mean against literal computations, what ships, refusals, and resume bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_backbone, tiny_prompts, tiny_rollout, tiny_unet
from torch import Tensor, nn

from fastunlearn.config import Config, load_config
from fastunlearn.denoisers.ema import Ema
from fastunlearn.denoisers.predictors import Evaluations, Predictors
from fastunlearn.errors import UserError
from fastunlearn.export.formats.delta import load_delta
from fastunlearn.methods.tables import build_method
from fastunlearn.models.description import describe_model
from fastunlearn.planning.plan import make_plan
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.training.setup import exponential_average

ROOT = Path(__file__).resolve().parents[2]
STEP = KeyStep(update=0, concept=0, index=3, restart=True, continues=False)


def call(ema: Ema, x: Tensor) -> Tensor:
    """A mean of a Linear, whose output is one tensor."""
    out: Any = ema(x)
    return out


def a_config(**fields: object) -> Config:
    return Config.model_validate({"method": "sdd", "concepts": ["neon style"], "surgery": {"enabled": False}, **fields})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_distance_of_two_predictions_of_the_student(kind: str) -> None:
    """The student and the teacher are told apart by their weights; the target carries no gradient."""
    prompt_table = tiny_prompts(templates=["{concept} x"], anchor_templates=["x"])
    backbone = tiny_backbone(prompt_table, kind)
    student, other = backbone.unet, tiny_unet(seed=1)
    models = Predictors(backbone, student, student, other)
    models.sampler = other
    rollout = tiny_rollout(models, prompt_table)
    rollout.restart(STEP)
    (window,) = rollout.batches(STEP, None)
    counted = Evaluations(**models.state_dict())
    outcome = build_method(a_config(train={"loss_weighting": "epsilon"})).loss(models, window)
    x, t = window.latents, window.timesteps
    with torch.no_grad():
        target = backbone.predict(student, x, t, window.anchor)
    prediction = backbone.predict(student, x, t, window.cond)
    alpha = backbone.noise.scheduler.alphas_cumprod[t]
    factor = alpha[0] if kind == "v_prediction" else 1.0  # of a difference, squared, in terms of the noise
    differences = [a - b for a, b in zip(prediction.flatten(), target.flatten(), strict=True)]
    literal = factor * torch.stack([d * d for d in differences]).sum() / x.numel()
    assert outcome.loss is not None and outcome.guided is None
    torch.testing.assert_close(outcome.loss, literal)
    wanted = torch.autograd.grad(literal, list(student.parameters()), allow_unused=True)
    got = torch.autograd.grad(outcome.loss, list(student.parameters()), allow_unused=True)
    for one, two in zip(got, wanted, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)
    after = models.evaluations
    assert (after.student_forward - counted.student_forward, after.student_backward) == (2, 1)
    assert after.teacher == 0 and after.rollout == counted.rollout


@pytest.mark.parametrize("warmup", [False, True])
def test_the_running_mean_is_the_recurrence(warmup: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    named = dict(model.named_parameters())
    ema = Ema(model, named, 0.8, warmup=warmup)
    literal = {name: p.detach().double().clone() for name, p in named.items()}
    for n in range(1, 40):
        for parameter in named.values():
            parameter.data.add_(torch.randn_like(parameter))
        ema.update()
        decay = min(0.8, (1 + n) / (10 + n)) if warmup else 0.8
        literal = {name: decay * mean + (1 - decay) * named[name].detach().double() for name, mean in literal.items()}
    for name, mean in literal.items():
        torch.testing.assert_close(ema.mean[name].double(), mean, rtol=1e-5, atol=1e-5)
    x = torch.randn(4, 3)
    out = call(ema, x)
    torch.testing.assert_close(out, x @ ema.mean["weight"].T + ema.mean["bias"])
    assert not torch.allclose(out, model(x)) and not out.requires_grad


def test_of_bf16_weights_the_mean_keeps_what_bf16_would_lose() -> None:
    model = nn.Linear(8, 8, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    ema = Ema(model, dict(model.named_parameters()), 0.999, warmup=False)
    nn.init.constant_(model.weight, 1.0078125)  # the next number in bf16
    for _ in range(100):
        ema.update()
    assert ema.mean["weight"].dtype == torch.float32
    expected = 1.0 + 0.0078125 * (1 - 0.999**100)
    torch.testing.assert_close(ema.mean["weight"], torch.full((8, 8), expected))
    assert call(ema, torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_saved_mean_goes_on_where_it_was() -> None:
    model = nn.Linear(3, 2)
    one, other = (Ema(model, dict(model.named_parameters()), 0.9, warmup=True) for _ in range(2))
    for turn in range(6):
        model.weight.data.add_(1.0)
        one.update()
        if turn < 3:
            other.update()
        elif turn == 3:
            saved = Ema(model, dict(model.named_parameters()), 0.9, warmup=True)
            saved.load_state_dict(other.state_dict())
            other = saved
            other.update()
        else:
            other.update()
    assert all(torch.equal(one.mean[name], other.mean[name]) for name in one.mean)
    assert torch.equal(call(one, torch.ones(1, 3)), call(other, torch.ones(1, 3)))


def test_the_mean_walks_the_trajectories() -> None:
    prompt_table = tiny_prompts()
    backbone = tiny_backbone(prompt_table)
    engine: Any = SimpleNamespace(sampler=backbone.unet, named=dict(backbone.unet.named_parameters()))
    ema = exponential_average(a_config(sdd={"ema_decay": 0.5}), engine)
    models = Predictors(backbone, backbone.unet, backbone.unet, tiny_unet(seed=1), ema)
    rollout = tiny_rollout(models, prompt_table)
    rollout.restart(STEP)
    assert ema is not None
    before = rollout.latents.clone()
    with torch.no_grad():
        for parameter in backbone.unet.parameters():
            parameter.add_(0.05)
    rollout.restart(STEP)
    assert torch.equal(rollout.latents, before)  # the student has moved, the mean has not
    ema.update()
    rollout.restart(STEP)
    assert not torch.allclose(rollout.latents, before)


REFUSED = [
    (["--zero_stage", "3"], ("zero.stage", "3", "zero.stage 2")),
    (["--teacher.storage", "cached"], ("teacher.storage", "'cached'", "its student's")),
    (["--teacher.storage", "int8"], ("teacher.storage", "'int8'", "without surgery")),
    (["--sdd.ema_decay", "1"], ("sdd.ema_decay", "less than 1")),
    (["--sdd.ema_decay", "-0.1"], ("sdd.ema_decay", "at least 0")),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_what_cannot_be_is_refused_in_one_line(arguments: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refusal:
        load_config(None, ["--method", "sdd", "--concepts", "neon style", "--surgery.enabled", "false", *arguments])
    assert "\n" not in str(refusal.value) and all(word in str(refusal.value) for word in words), str(refusal.value)


def test_the_plan_counts_the_mean_instead_of_a_teacher() -> None:
    def rows(**fields: object) -> dict[str, int]:
        cfg = a_config(**fields)
        plan = make_plan(cfg, 1, describe_model(cfg))
        found = {row.name.split(":")[0].split(" of ")[0]: row.device for row in plan.rows}
        return found | {"trained": sum(plan.sizes.trained)}

    plain = rows()
    assert plain["running mean"] == 4 * plain["trained"] and "teacher" not in plain
    half = rows(model={"mixed_precision": "bf16"}, surgery={"enabled": True})
    assert half["running mean"] == 6 * half["trained"] and half["teacher"] == 2 * half["trained"]


SHORT = [
    "--method", "sdd", "--concepts", "neon style", "--max_train_steps", "6", "--sampler.num_inference_steps", "4",
    "--learning_rate", "1e-3", "--train.cpu_threads", "1", "--evaluation.mode", "off", "--progress.enabled", "false",
    "--evaluation.num_inference_steps", "2", "--num_validation_images", "1", "--sdd.ema_decay", "0.9",
    "--surgery.enabled", "false",
]  # fmt: skip


def run(out: Path, *more: str) -> None:
    train = str(ROOT / "fastunlearn" / "train.py")
    done = forked.run([train, *SHORT, "--output_dir", str(out), *more], out.parent, cwd=out.parent)
    assert done.returncode == 0, done.stderr


ENGINES = {
    "zero-2": ("--zero_stage", "2", "--mixed_precision", "bf16", "--export.dtype", "fp32"),
    "fused": ("--engine", "fused", "--export.dtype", "fp32"),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_ships_its_mean_and_resumes_bit_for_bit(engine: str, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    run(out, *ENGINES[engine], "--checkpointing_steps", "3")
    run(other, *ENGINES[engine], "--resume_from_checkpoint", str(out / "checkpoint-3"))
    whole, resumed = (load_file(next((folder / "unet").glob("*.safetensors"))) for folder in (out, other))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    parts = torch.load(out / "checkpoint-3" / "parts-rank-0.pt", weights_only=True)
    assert parts["ema"]["updates"] == 3
    delta, _ = load_delta(out / "delta.safetensors")
    assert set(parts["ema"]["mean"]) == set(delta)
    counts = json.loads((out / "metrics.json").read_text())["unet_evaluations"]
    assert counts["student_forward"] == 12 and counts["student_backward"] == 6 and counts["teacher"] == 0
    # With a decay of 0 the mean is the student: what ships is then something else.
    run(tmp_path / "student", *ENGINES[engine], "--sdd.ema_decay", "0")
    student, _ = load_delta(tmp_path / "student" / "delta.safetensors")
    assert any(not torch.equal(delta[name], student[name]) for name in delta)
