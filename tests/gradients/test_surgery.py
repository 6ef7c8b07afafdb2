"""Surgery and retain sets in one process: what is refused, what is skipped, what is kept, and from where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from one_projection import ALONE, Surgery
from PIL import Image
from surgery_case import RETAINED, the_pool, the_prompts
from tiny import tiny_backbone, tiny_rollout

from fastunlearn.config import Config, SurgeryConfig
from fastunlearn.config.run_prompts import folder_captions, retain_prompts
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.denoisers.teacher import Teacher
from fastunlearn.errors import UserError
from fastunlearn.gradients.shard import GradientShard
from fastunlearn.models.parameter_names import block_of
from fastunlearn.sampling.batch import BatchLayout
from fastunlearn.sampling.image_pool import generate_pool
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.retain import PoolSource, TrajectorySource, build_source, retain_loss

STEP = KeyStep(update=0, concept=0, index=3, restart=True, continues=True)


def a_config(**fields: object) -> Config:
    base: dict = {"concepts": ["neon style"], "evaluation": {"mode": "off"}, "surgery": {"enabled": True}}
    return Config.model_validate(base | fields)


def a_surgery(**fields: object) -> Surgery:
    cfg = SurgeryConfig.model_validate({"enabled": True} | fields)
    return Surgery(cfg, ["down_blocks.1.attentions.0.a", "up_blocks.0.attentions.1.b"])


def pieces(*tensors: torch.Tensor) -> list[GradientShard]:
    names = ["down_blocks.1.attentions.0.a", "up_blocks.0.attentions.1.b"]
    return [GradientShard(name, tensor) for name, tensor in zip(names, tensors, strict=True)]


def models() -> Predictors:
    backbone = tiny_backbone(the_prompts())
    return Predictors(backbone, backbone.unet, backbone.unet, Teacher(backbone.unet, [], whole_copy=True))


@pytest.mark.parametrize("dtype", ["auto", "fp32", "bf16", "int8"])
@pytest.mark.parametrize("place", ["device", "host"])
def test_what_points_against_the_kept_gradient_is_gone(dtype: str, place: str) -> None:
    surgery = a_surgery(retain_dtype=dtype, retain_device=place)
    retain = [torch.randn(1000), torch.randn(300)]
    unlearn = [-0.5 * retain[0] + torch.randn(1000), 0.5 * retain[1] + torch.randn(300)]
    before = [u.clone() for u in unlearn]
    surgery.keep(pieces(*[r.clone() for r in retain]))
    figures = surgery.project(pieces(*unlearn))
    assert abs(float(unlearn[0] @ retain[0])) < 2e-2 * float(retain[0] @ retain[0])
    assert torch.equal(unlearn[1], before[1])
    assert float(figures.conflicting_share) == 0.5
    assert surgery.is_finite(figures)


def test_a_gradient_that_is_not_finite_is_skipped_counted_and_in_the_end_refused() -> None:
    surgery = a_surgery(max_skipped_updates=2)
    good, bad = [torch.randn(8), torch.randn(8)], [torch.randn(8), torch.tensor([float("nan")] * 8)]
    for number, (retain, unlearn) in enumerate([(bad, good), (good, good), (good, bad)]):
        kept = [u.clone() for u in unlearn]
        surgery.keep(pieces(*[r.clone() for r in retain]))
        figures = surgery.project(pieces(*kept))
        assert surgery.is_finite(figures) == (number == 1)
        untouched = [torch.equal(a, b) or bool(b.isnan().any()) for a, b in zip(kept, unlearn, strict=True)]
        assert number == 1 or all(untouched)
    assert surgery.guard.skipped == 2
    surgery.keep(pieces(*bad))
    with pytest.raises(UserError, match="2 updates in a row"):
        surgery.is_finite(surgery.project(pieces(*[g.clone() for g in good])))


def test_a_running_mean_is_saved_and_continued() -> None:
    first, second, third = ([torch.randn(500), torch.randn(20)] for _ in range(3))
    whole, part = a_surgery(retain_ema=0.9, rho=1.0), a_surgery(retain_ema=0.9, rho=1.0)
    for retain in (first, second):
        whole.keep(pieces(*[r.clone() for r in retain]))
        part.keep(pieces(*[r.clone() for r in retain]))
    resumed = a_surgery(retain_ema=0.9, rho=1.0)
    resumed.load_state_dict(part.state_dict())
    results = []
    for surgery in (whole, resumed):
        unlearn = [torch.ones(500), torch.ones(20)]
        surgery.keep(pieces(*[r.clone() for r in third]))
        surgery.project(pieces(*unlearn))
        results.append(unlearn)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_running_mean_begins_anew_after_a_retain_gradient_that_is_not_finite() -> None:
    surgery, fresh = a_surgery(retain_ema=0.9, rho=1.0), a_surgery(retain_ema=0.9, rho=1.0)
    bad, good = [torch.tensor([float("inf")] * 8), torch.randn(8)], [torch.randn(8), torch.randn(8)]
    surgery.keep(pieces(*bad))
    assert not surgery.is_finite(surgery.project(pieces(torch.ones(8), torch.ones(8))))
    results = []
    for one in (surgery, fresh):
        unlearn = [torch.ones(8), torch.ones(8)]
        one.keep(pieces(*[r.clone() for r in good]))
        assert one.is_finite(one.project(pieces(*unlearn)))
        results.append(unlearn)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_blocks_are_named_after_the_unet() -> None:
    assert block_of("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight") == "down_blocks.1.attentions.0"
    assert block_of("mid_block.attentions.0.proj_in.weight") == "mid_block.attentions.0"
    assert block_of("conv_in.weight") == "conv_in"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"retain": {"prompts": ["a cat in neon style"]}}, "names 'neon style'"),
        ({"retain": {"prompts": ["a {thing}"]}}, "may hold {object} and {style} only"),
        ({"retain": {"source": "folder"}}, "retain.folder: none given"),
        ({"retain": {"source": "prompts", "target": "noise"}}, "needs pictures"),
        ({"surgery": {"enabled": True, "projection": "released", "metric": "optimizer"}}, "surgery.metric"),
        ({"model": {"pretrained_model_name_or_path": "some/model"}, "retain": {"neighbours": 0}}, "nothing to retain"),
        ({"method": "doco", "prompts": {"templates": ["{concept}"]}}, "has no anchor"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("{", r"\{").replace("}", r"\}")) as refusal:
        a_config(**fields)
    assert "\n" not in str(refusal.value)


def test_retain_prompts_name_every_kept_concept_and_never_an_erased_one() -> None:
    prompts = retain_prompts(a_config(concepts=["cat"]))
    assert "ink style" in prompts and "tree" in prompts and "a picture of a tree in ink style" in prompts
    assert not [prompt for prompt in prompts if "cat" in prompt.split()]
    with pytest.raises(UserError, match="kitty"):
        a_config(concepts=["cat"], retain={"prompts": ["a kitty"]})


def test_a_folder_needs_captions_that_name_nothing_erased(tmp_path: Path) -> None:
    cfg = a_config(retain={"source": "folder", "folder": str(tmp_path)})
    with pytest.raises(UserError, match="holds no image"):
        folder_captions(cfg)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png has no caption"):
        folder_captions(cfg)
    (tmp_path / "a.txt").write_text("a tree")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b.png", "text": "a neon sign"}) + "\n")
    with pytest.raises(UserError, match=r"b\.png: 'a neon sign' names 'neon style'"):
        folder_captions(cfg)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b.png", "text": "a house"}) + "\n")
    assert [caption for _, caption in folder_captions(cfg)] == ["a tree", "a house"]


def test_a_batch_does_not_depend_on_how_it_is_spread() -> None:
    cfg, prompt_table, m = a_config(), the_prompts(), models()
    (whole,) = PoolSource(cfg, m, prompt_table, BatchLayout(0, 1, 4, 1), the_pool()).batches(STEP, 500)
    parts = [
        PoolSource(cfg, m, prompt_table, BatchLayout(rank, 2, 2, 1), the_pool()).batches(STEP, 500)[0]
        for rank in range(2)
    ]
    assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))
    assert torch.equal(whole.cond.hidden, torch.cat([part.cond.hidden for part in parts]))


def test_retain_loss_is_zero_for_a_student_that_is_still_the_teacher() -> None:
    cfg, m = a_config(), models()
    (batch,) = PoolSource(cfg, m, the_prompts(), BatchLayout(0, 1, 2, 1), the_pool()).batches(STEP, 500)
    assert float(retain_loss(m, batch, "teacher").detach()) < 1e-10
    noise = retain_loss(m, batch, "noise")
    (student,) = m.train(batch.latents, batch.timesteps, batch.cond)
    assert batch.noise is not None
    torch.testing.assert_close(noise, (student - batch.noise).square().mean())


def test_pictures_are_drawn_by_the_frozen_model_and_counted() -> None:
    cfg, m = a_config(retain={"num_images": 5, "num_inference_steps": 3, "batch_size": 2}), models()
    pool = generate_pool(cfg, m, the_prompts(), RETAINED)
    assert pool.latents.shape == (5, 4, 8, 8) and set(pool.prompts) == set(RETAINED)
    assert m.evaluations.teacher == 5 * 3 * 2 and m.evaluations.rollout == 0


def test_prompts_alone_walk_trajectories_of_their_own() -> None:
    cfg, m = a_config(retain={"source": "prompts", "batch_size": 2}, sampler={"num_inference_steps": 50}), models()
    source = build_source(cfg, m, the_prompts(), ALONE, None)
    assert isinstance(source, TrajectorySource)
    unlearn = tiny_rollout(m, the_prompts(), steps=50)
    unlearn.restart(STEP)
    (batch,) = source.batches(STEP, unlearn.timesteps[3])
    assert batch.timesteps.tolist() == [unlearn.timesteps[3]] * 2 and batch.noise is None
    (later,) = source.batches(KeyStep(1, 0, 4, restart=False, continues=True), unlearn.timesteps[4])
    assert not torch.equal(batch.latents, later.latents)
