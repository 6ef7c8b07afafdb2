"""The fused engine against plain fp64 training of the same update, and what it promises beyond that.

The reference is that of test_surgery_matrix.py: whole gradients in one process, the textbook formula, torch's AdamW. So
the fused engine is held to the very weights to which the ZeRO engine is held.
"""

from __future__ import annotations

import gc
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_worker import storage_bytes
from surgery_case import CLIP, Case, config_of, the_pool, the_prompts, trained_names
from surgery_reference import reference
from tiny import flat, tiny_unet
from tiny_run import tiny_run, update_all

from fastunlearn.config import Config
from fastunlearn.engines.base import ExportedWeights
from fastunlearn.engines.fused.engine import FusedEngine
from fastunlearn.engines.fused.memory import fused_rows
from fastunlearn.engines.fused.moments import HostMoments
from fastunlearn.errors import UserError
from fastunlearn.models.description import ModelDescription
from fastunlearn.models.parameter_names import layer_of, trainable_names
from fastunlearn.planning.plan import unet_sizes
from fastunlearn.training.setup import Run
from fastunlearn.training.trainer import capture_retain_gradient, one_update
from fastunlearn.utils.distributed import World

WORLD = World(0, 1, torch.device("cpu"))
TOLERANCE = {"fp32": 1e-4, "int8": 2e-2, "bf16": 1e-2}


def the_case(**changes: Any) -> Case:
    options: dict[str, Any] = {"granularity": "tensor", "retain_dtype": "fp32", "clip": False}
    return Case(0, False, 1, False, **(options | changes))


def fused_config(case: Case, **sections: dict[str, Any]) -> Config:
    data = config_of(case, 1).model_dump() | {"engine": "fused"}
    for name, values in sections.items():
        data[name] |= values
    return Config.model_validate(data)


def fused_run(case: Case, **sections: dict[str, Any]) -> Run:
    cfg = fused_config(case, **sections)
    return tiny_run(cfg, WORLD, the_prompts(), trained_names(tiny_unet()), the_pool())


def error(run: Run, expected: tuple[torch.Tensor, torch.Tensor]) -> float:
    start, wanted = expected
    return float((flat(run.engine.export_weights().trained) - wanted).norm() / (wanted - start).norm())


EXTRAS: list[dict[str, object]] = [
    {}, {"rho": 0.5}, {"two_sided": True}, {"strength": 0.5}, {"projection": "none", "rho": 0.5},
    {"projection": "released"}, {"metric": "optimizer"}, {"retain_ema": 0.5}, {"retain_device": "host"},
]  # fmt: skip


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: "-".join(extra) or "plain")
def test_the_fused_engine_reaches_the_weights_of_plain_training(extra: dict[str, object]) -> None:
    case = the_case(extra=tuple(extra.items()))
    run = fused_run(case)
    update_all(run)
    # AdamW divides by what the weighted dot products divide by: no longer linear in the gradient.
    bound = 1e-3 if "metric" in extra else TOLERANCE["fp32"]
    assert error(run, reference(False, "tensor", case.extra)) < bound


@pytest.mark.parametrize("dtype", ["auto", "int8", "bf16"])
def test_a_retain_gradient_in_fewer_bits_stays_within_its_bound(dtype: str) -> None:
    run = fused_run(the_case(retain_dtype=dtype))
    update_all(run)
    found = error(run, reference(False, "tensor", ()))
    bound = TOLERANCE["int8" if dtype == "auto" else dtype]
    assert 1e-6 < found < bound  # auto is 8 bits, and 8 bits are not exact


def test_without_surgery_it_is_plain_adamw() -> None:
    run = fused_run(the_case(), surgery={"enabled": False})
    plain = fused_run(the_case(extra=(("strength", 0.0),)))
    plain.retain = run.retain = None
    for each in (run, plain):
        update_all(each)
    assert torch.equal(flat(run.engine.export_weights().trained), flat(plain.engine.export_weights().trained))
    assert float(run.engine.grad_norm) > 0  # type: ignore[arg-type]


def test_moments_on_the_host_change_nothing() -> None:
    kept, offloaded = (fused_run(the_case(), fused={"offload_optimizer": place}) for place in ("none", "cpu"))
    for run in (kept, offloaded):
        update_all(run)
    assert torch.equal(flat(kept.engine.export_weights().trained), flat(offloaded.engine.export_weights().trained))


def test_clipping_goes_by_the_norm_of_the_update_before() -> None:
    """With a linear optimizer step the second update is scaled by limit / (norm of the first)."""
    free, clipped = fused_run(the_case(updates=2)), fused_run(the_case(updates=2, clip=True))
    moved = []
    for run in (free, clipped):
        run.rollout.restart(run.table[0])
        one_update(run, run.table[0])
        # The same weights before the second update, so that both see the same gradient.
        with torch.no_grad():
            for name, parameter in run.engine.named.items():
                parameter.copy_(dict(tiny_unet().named_parameters())[name])
        assert isinstance(run.engine, FusedEngine)
        for layer in run.engine._layers:
            layer.optimizer.state.clear()
        one_update(run, run.table[1])
        weights = flat(run.engine.export_weights().trained)
        start = flat({name: p for name, p in tiny_unet().named_parameters() if name in run.engine.named})
        moved.append(weights - start)
    norm = float(free.engine.grad_norm)  # type: ignore[arg-type]
    first = float(moved[1].norm() / moved[0].norm())
    assert norm > CLIP
    assert first == pytest.approx(CLIP / first_norm(), rel=1e-2)


def first_norm() -> float:
    run = fused_run(the_case(updates=2))
    run.rollout.restart(run.table[0])
    one_update(run, run.table[0])
    return float(run.engine.grad_norm)  # type: ignore[arg-type]


def test_at_most_one_layer_of_gradients_is_alive() -> None:
    """Counted whenever a gradient arrives: bytes in .grad of all parameters."""
    run = fused_run(the_case(updates=1))
    engine = run.engine
    assert isinstance(engine, FusedEngine)
    sizes: dict[str, int] = {}
    for name, parameter in engine.named.items():
        layer = layer_of(name, parameter.numel())
        sizes[layer] = sizes.get(layer, 0) + parameter.numel()
    alive: list[int] = []
    for parameter in engine.named.values():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad.numel() for p in engine.named.values() if p.grad is not None))
        )
    update_all(run)
    largest = max(size for layer, size in sizes.items() if layer != "small")
    assert 0 < max(alive) <= largest + sizes["small"] < sum(sizes.values())
    assert all(p.grad is None for p in engine.named.values())


def test_nothing_of_it_outlives_the_run() -> None:
    """What comes after training, the pictures and the files, needs the memory."""
    run = fused_run(the_case(updates=1))
    update_all(run)
    engine = run.engine
    assert isinstance(engine, FusedEngine)
    left = [weakref.ref(thing) for thing in (engine, run.models.backbone.unet, engine._layers[0].optimizer)]
    del run, engine
    gc.collect()
    assert [thing() for thing in left] == [None, None, None]


def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    run = fused_run(the_case(updates=2, extra=(("max_skipped_updates", 2),)))
    before = flat(run.engine.export_weights().trained)
    loss = run.method.loss
    monkeypatch.setattr(run.method, "loss", lambda *args: spoiled(loss(*args)))
    run.rollout.restart(run.table[0])
    one_update(run, run.table[0])
    assert torch.equal(flat(run.engine.export_weights().trained), before)
    assert run.engine.guard.skipped == 1
    with pytest.raises(UserError, match="max_skipped_updates"):
        one_update(run, run.table[1])


def spoiled(outcome: Any) -> Any:
    return type(outcome)(outcome.loss * torch.tensor(float("nan")), outcome.guided)


def test_a_gradient_that_is_not_finite_is_not_applied_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    run = fused_run(the_case(updates=1))
    name = "conv_out.bias"
    parameter = run.engine.named[name]
    hooks = parameter.register_hook(lambda g: g * float("inf"))
    before = run.engine.export_weights().trained
    update_all(run)
    hooks.remove()
    assert run.engine.guard.skipped == 1
    assert all(weight.isfinite().all() for weight in run.engine.export_weights().trained.values())
    assert torch.equal(run.engine.export_weights().trained[name], before[name])


MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def test_nothing_moves_where_the_retain_gradient_is_not_finite() -> None:
    """It is known before the first layer is stepped."""
    run = fused_run(the_case(updates=1))
    window = iter([float("inf"), 1.0])  # the retain window, then the unlearning window
    run.engine.named[MIDDLE].register_hook(lambda g: g * next(window))
    before = flat(run.engine.export_weights().trained)
    update_all(run)
    assert run.engine.guard.skipped == 1
    assert torch.equal(flat(run.engine.export_weights().trained), before)


def test_no_layer_moves_after_one_whose_gradient_is_not_finite() -> None:
    """Of the layers of a U-Net the last is stepped first, and small tensors together with the last of them."""
    run = fused_run(the_case(updates=1))
    window = iter([1.0, float("inf")])
    run.engine.named[MIDDLE].register_hook(lambda g: g * next(window))
    before = run.engine.export_weights().trained
    update_all(run)
    after = run.engine.export_weights().trained
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert run.engine.guard.skipped == 1
    assert {name.partition(".")[0] for name in moved} == {"up_blocks"}


def test_a_run_goes_on_bit_for_bit_from_its_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "model": {"mixed_precision": "bf16"}, "optimizer": {"name": "adamw8bit"}, "train": {"lr_scheduler": "linear"},
        "fused": {"offload_optimizer": "cpu"},
    }  # fmt: skip
    case = the_case(updates=4, clip=True, extra=(("retain_ema", 0.5),))
    whole = fused_run(case, **options)
    update_all(whole)
    half = fused_run(case, **options)
    half.rollout.restart(half.table[0])
    for step in half.table[:2]:
        one_update(half, step)
    half.engine.save(tmp_path)
    latents = half.rollout.state_dict()
    again = fused_run(case, **options)
    again.rollout.load_state_dict(latents)
    again.engine.load(tmp_path)
    assert again.engine.learning_rate == half.engine.learning_rate
    for step in again.table[2:]:
        one_update(again, step)
    assert torch.equal(flat(again.engine.export_weights().trained), flat(whole.engine.export_weights().trained))


def test_stochastic_rounding_keeps_updates_that_are_too_small_for_bf16() -> None:
    """Each update is a fraction of the distance between two bf16 numbers: to nearest, it is lost."""
    options: dict[str, Any] = {"optimizer": {"adam_epsilon": 1e-8}, "surgery": {"enabled": False}}
    options["train"] = {"learning_rate": 4e-6}
    half = {"model": {"mixed_precision": "bf16"}}
    runs = [fused_run(the_case(updates=8), **options, **more) for more in ({}, half, half)]
    assert isinstance(runs[2].engine, FusedEngine)
    for layer in runs[2].engine._layers:
        layer.optimizer.stochastic_rounding = False
    exact, stochastic, nearest = (moved(run) for run in runs)
    assert along(stochastic, exact) == pytest.approx(1.0, abs=0.3)
    assert abs(along(nearest, exact)) < 0.3


def moved(run: Run) -> torch.Tensor:
    run.retain = None
    start = flat(run.engine.export_weights().trained)
    update_all(run)
    return flat(run.engine.export_weights().trained) - start


def along(move: torch.Tensor, exact: torch.Tensor) -> float:
    """How far a move goes in the direction of the exact one, element by element."""
    return float((move * exact.sign()).sum() / exact.abs().sum())


def test_what_bf16_changed_is_added_to_the_original() -> None:
    original = torch.tensor([1.001, -3.0003, 0.1234])
    rounded = original.bfloat16().float()
    trained = {"w": rounded + torch.tensor([0.0, 0.25, 0.0])}
    result = ExportedWeights(trained, rounded=True).restored({"w": original})["w"]
    assert torch.equal(result, original + torch.tensor([0.0, 0.25, 0.0]))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"train": {"gradient_accumulation_steps": 2}}, "train.gradient_accumulation_steps"),
    ({"surgery": {"enabled": True, "granularity": "global"}}, "surgery.granularity"),
    ({"optimizer": {"name": "paged_adamw8bit"}}, "optimizer.name"),
    ({"zero": {"stage": 2}}, "zero"),
    ({"zero": {"offload_optimizer": "cpu"}}, "zero"),
    ({"surgery": {"enabled": True, "projection": "released"}, "train": {"max_grad_norm": 1.0}}, "surgery.projection"),
]


@pytest.mark.parametrize(("sections", "field"), BAD, ids=[field for _, field in BAD])
def test_what_the_fused_engine_cannot_do_is_refused(sections: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(field)}:"):
        Config.model_validate({"engine": "fused", "concepts": ["neon style"], **sections})


def test_several_ranks_and_a_foreign_setting_are_refused() -> None:
    cfg = Config.model_validate({"engine": "fused", "concepts": ["neon style"]})
    with pytest.raises(UserError, match=r"^num_gpus:"):
        cfg.validate_runtime(2, cpu_count=4)
    with pytest.raises(UserError, match=r"^fused\.offload_optimizer:"):
        Config.model_validate({"concepts": ["neon style"], "fused": {"offload_optimizer": "cpu"}})


PLAN_CASES: list[dict[str, Any]] = [
    {"optimizer": {"name": "adamw8bit"}},
    {"optimizer": {"name": "adamw"}, "model": {"mixed_precision": "bf16"}, "surgery": {"retain_dtype": "bf16"}},
    {"teacher": {"storage": "int8"}, "surgery": {"retain_device": "host"}, "optimizer": {"name": "adamw8bit"}},
    {"fused": {"offload_optimizer": "cpu"}, "optimizer": {"name": "adamw8bit"}, "teacher": {"storage": "fp8"}},
]


@pytest.mark.parametrize("sections", PLAN_CASES, ids=["8bit", "bf16", "teacher-int8", "offload"])
def test_the_planner_knows_what_the_engine_holds(sections: dict[str, Any]) -> None:
    """Rows against bytes of storage, all of the tiny U-Net trained. 2 %, and 15 % for a teacher in
    8 bits: matrices as small as these have many scales and much padding for their size."""
    cfg = fused_config(the_case(updates=1, retain_dtype="auto"), **sections)
    names = trainable_names(tiny_unet(), "full")
    run = tiny_run(cfg, WORLD, the_prompts(), names, the_pool())
    engine, step = run.engine, run.table[0]
    assert isinstance(engine, FusedEngine)
    run.rollout.restart(step)
    capture_retain_gradient(run, step)
    kept = [thing for layer in engine._layers for thing in held_by(layer.kept._stored)]
    found = {"retain gradient (": storage_bytes(kept)}
    found["U-Net weights"] = storage_bytes(list(run.models.backbone.unet.parameters()))
    update_all(run)
    states = [state for layer in engine._layers for state in layer.optimizer.state.values()]
    moments = [state[key] for state in states for key in HostMoments.KEYS if key in state]
    found["optimizer state ("] = storage_bytes(moments)
    found["teacher: originals"] = storage_bytes(teacher_tensors(run.models.teacher))
    config = json.dumps(dict(run.models.backbone.unet.config) | {"_class_name": "UNet2DConditionModel"})
    rows = fused_rows(cfg, unet_sizes(ModelDescription(config, 5, 8, 0), "full"))
    for start, size in found.items():
        (row,) = (row for row in rows if row.name.startswith(start))
        share = 0.15 if row.name.endswith(("(int8)", "(fp8)")) and "teacher" in row.name else 0.02
        assert row.device + row.host == pytest.approx(size, rel=share), row
    on_host = {row.name.partition(" (")[0] for row in rows if row.host}
    assert on_host == ({"optimizer state"} if "fused" in sections else set()) | (
        {"retain gradient"} if sections.get("surgery", {}).get("retain_device") == "host" else set()
    )


def held_by(kept: Any) -> list[torch.Tensor]:
    return [*kept.codes, *kept.absmax] if hasattr(kept, "codes") else list(kept or [])


def teacher_tensors(teacher: Any) -> list[torch.Tensor]:
    stored = [one for loan in teacher._swaps for one in loan._stored.values()]
    found = [one.exact for one in stored if one.exact is not None]
    found += [tensor for one in stored if one.quantized for tensor in held_by(one.quantized)]
    found += [tensor for one in stored if hasattr(one, "codes") for tensor in (one.codes, one.scale)]
    return [*found, *teacher.frozen.values()]
