"""What `fastunlearn plan` says, against what a run holds: bytes tensor by tensor, activations, U-Net evaluations.

One launch runs all cases of `plan_worker.py` on two ranks. Stated bounds: weights, teacher, master weights, optimizer
state, gradients and the kept retain gradient within 64 bytes; the peaks of putting aside and of the optimizer step
within 10 %; activations within 10 % of what autograd saves in a real forward pass on the CPU.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from launched import WORKERS, run_ranks
from plan_worker import COUNT_CASES, SCOPE, STATE_CASES, WORLD, count_config, state_config
from tiny import tiny_unet
from tiny_run import SMALL_TENSOR_NUMEL

from fastunlearn import cli
from fastunlearn.config import Config
from fastunlearn.engines.optimizers.groups import parameter_groups
from fastunlearn.engines.zero.memory import ZeroMemory
from fastunlearn.engines.zero.partition import rank_partitions
from fastunlearn.minicanvas import pipeline_path
from fastunlearn.models import parameter_names
from fastunlearn.models.description import ModelDescription, describe_model
from fastunlearn.models.parameter_names import set_trainable, trainable_names
from fastunlearn.planning.activations import Shape, example_inputs, measure
from fastunlearn.planning.advice import _changes, apply, smallest_change
from fastunlearn.planning.plan import ALLOWANCE, Plan, make_plan, unet_sizes
from fastunlearn.planning.unet_calls import count_evaluations
from fastunlearn.utils.memory_rows import Row, Sizes
from fastunlearn.utils.text import GIB

WORKER = WORKERS / "plan_worker.py"
OTHER_WORLDS = ("stage1-bf16-kept-fp32", "stage2-bf16", "stage3-bf16-offload")
STATE_BYTES = 64  # a few elements of padding that DeepSpeed allocates apart
PEAK_SHARE = ACTIVATION_SHARE = 0.1
SDXL = {
    "_class_name": "UNet2DConditionModel", "sample_size": 128, "in_channels": 4, "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
MINICANVAS = ["--concepts", "neon style"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    run_ranks(WORKER, folder, world=WORLD)
    return folder


@pytest.fixture(scope="module")
def tiny_sizes() -> Sizes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameter_names, "SMALL_TENSOR_NUMEL", SMALL_TENSOR_NUMEL)
        groups = parameter_groups(tiny_unet().named_parameters())
    assert SCOPE == "full"  # nothing is frozen
    return Sizes(tuple((group["bits"], tuple(p.numel() for p in group["params"])) for group in groups), ())


def planned(rows: list[Row]) -> dict[str, int]:
    """The plan's rows under the names of the worker's figures; device and host are one on a CPU."""
    names = {
        "U-Net weights": "weights", "teacher": "teacher", "fp32 master": "masters", "optimizer state": "optimizer",
        "gradients": "gradients", "retain gradient (": "kept",
    }  # fmt: skip
    found = dict.fromkeys([*names.values(), "keep_peak", "update_peak"], 0)
    for row in rows:
        only = f"{row.phases[0]}_peak" if row.phases in (("keep",), ("update",)) else None
        name = only or next((to for start, to in names.items() if row.name.startswith(start)), None)
        if name is not None and row.name != "gradients of the next micro-batch":
            found[name] += row.device + row.host
    return found


@pytest.mark.parametrize("name", STATE_CASES)
def test_every_row_is_what_a_rank_holds(name: str, measured: Path, tiny_sizes: Sizes) -> None:
    hold_against_plan(name, WORLD, measured, tiny_sizes)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4])
def test_and_so_on_one_and_on_four_ranks(world: int, tmp_path: Path, tiny_sizes: Sizes) -> None:
    run_ranks(WORKER, tmp_path, *OTHER_WORLDS, world=world)
    for name in OTHER_WORLDS:
        hold_against_plan(name, world, tmp_path, tiny_sizes)


def hold_against_plan(name: str, world: int, folder: Path, tiny_sizes: Sizes) -> None:
    for rank in range(world):
        plan = planned(ZeroMemory(state_config(name), tiny_sizes, world, rank).rows())
        held = json.loads((folder / f"{name}-{rank}.json").read_text())
        cut = held.pop("cut")
        if cut:
            stage = state_config(name).zero_stage
            expected = rank_partitions(tiny_sizes, stage, world, rank)
            assert cut == [[part.numel, list(part.pieces)] for part in expected]
        for what, size in held.items():
            bound = STATE_BYTES + (PEAK_SHARE * size if what.endswith("_peak") else 0)
            assert abs(plan[what] - size) <= bound, (what, plan[what], size)


@pytest.mark.parametrize("name", COUNT_CASES)
def test_evaluations_are_those_of_the_run(name: str, measured: Path) -> None:
    ranks = [json.loads((measured / f"{name}-{rank}.json").read_text()) for rank in range(WORLD)]
    together = {kind: sum(rank[kind] for rank in ranks) for kind in ranks[0]}
    assert asdict(count_evaluations(count_config(name), WORLD)) == together


@pytest.mark.parametrize(("scope", "checkpointing"), [("attn2", False), ("noxattn", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_of_a_real_pass(scope: str, checkpointing: bool, dtype: torch.dtype) -> None:
    text = (pipeline_path() / "unet" / "config.json").read_text()
    shape, rows = Shape(16, 16, dtype, checkpointing=checkpointing), 2
    unet = UNet2DConditionModel.from_config(json.loads(text)).to(dtype).train()
    set_trainable(unet, trainable_names(unet, scope))
    if checkpointing:
        unet.enable_gradient_checkpointing()
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = unet(**example_inputs(json.loads(text), rows, shape, "cpu"), return_dict=False)[0]
    real = sum(storage.nbytes() for storage in saved.values())
    assert out.shape == (rows, 4, 16, 16)
    assert measure(text, scope, rows, shape).saved == pytest.approx(real, rel=ACTIVATION_SHARE)


def test_checkpointing_recomputes_one_block_and_eager_attention_keeps_its_matrix() -> None:
    text = (pipeline_path() / "unet" / "config.json").read_text()
    plain, eager = (measure(text, "attn2", 1, Shape(16, 16, eager=eager)) for eager in (False, True))
    less = measure(text, "attn2", 1, Shape(16, 16, checkpointing=True))
    assert less.saved < less.backward < plain.saved / 3
    assert eager.saved > plain.saved + 4 * 64 * 64 * 4  # one (heads, N, N) matrix in fp32, of several


def test_autocast_keeps_weights_cast_for_the_backward_pass() -> None:
    text = (pipeline_path() / "unet" / "config.json").read_text()
    one, two = (measure(text, "attn2", rows, Shape(16, 16, autocast=True)).saved for rows in (1, 2))
    half = measure(text, "attn2", 1, Shape(16, 16, torch.bfloat16)).saved
    weights = 2 * unet_sizes(describe_model(Config.model_validate({"concepts": ["cat"]})), "attn2").total
    assert one - (two - one) == pytest.approx(weights, rel=0.2)  # what does not grow with the batch
    assert half < two - one < 2.2 * half


@pytest.fixture(scope="module")
def sdxl() -> ModelDescription:
    return ModelDescription(json.dumps(SDXL), tokens=77, factor=8, loading=0)


def sdxl_config(**fields: dict) -> Config:
    base: dict = {
        "concepts": ["Van Gogh style"], "keep": ["Monet style"], "surgery": {"enabled": True},
        "model": {"pretrained_model_name_or_path": "sdxl", "mixed_precision": "bf16", "gradient_checkpointing": True},
        "retain": {"batch_size": 1},
    }  # fmt: skip
    for name, values in fields.items():
        base[name] = base.get(name, {}) | values
    return Config.model_validate(base)


def row(plan_rows: list[Row], name: str) -> Row:
    return next(row for row in plan_rows if row.name.startswith(name))


def test_sdxl_is_planned_without_weights(sdxl: ModelDescription) -> None:
    plan = make_plan(sdxl_config(), 1, sdxl)
    assert plan.sizes.total == 2_567_463_684 and len(plan.sizes.trained) == 350
    trained = sum(plan.sizes.trained)
    assert trained == 545_670_400
    assert row(plan.rows, "U-Net weights").device == 2 * plan.sizes.total
    assert row(plan.rows, "teacher").device == 2 * trained
    assert row(plan.rows, "fp32 master").device == 4 * trained
    assert row(plan.rows, "optimizer state").device == pytest.approx(8 * trained, abs=64)
    assert row(plan.rows, "retain gradient").device == 2 * trained
    smaller = make_plan(sdxl_config(optimizer={"name": "adamw8bit"}, surgery={"retain_dtype": "int8"}), 1, sdxl)
    assert row(smaller.rows, "optimizer state").device == pytest.approx(2.03 * trained, rel=0.01)
    assert row(smaller.rows, "retain gradient").device == pytest.approx(trained * (1 + 4 / 256), rel=0.01)


def test_ranks_share_what_their_stage_shards(sdxl: ModelDescription) -> None:
    one, two = (make_plan(sdxl_config(zero={"stage": 2}), world, sdxl) for world in (1, 2))
    for name in ("fp32 master", "optimizer state", "gradients", "retain gradient"):
        assert row(two.rows, name).device == pytest.approx(row(one.rows, name).device / 2, rel=0.02)
    three = make_plan(sdxl_config(zero={"stage": 3}), 2, sdxl)
    assert row(three.rows, "U-Net weights").device == pytest.approx(one.sizes.total, rel=1e-3)
    assert row(three.rows, "teacher: a whole").device == 2 * one.sizes.total
    offload = make_plan(sdxl_config(zero={"stage": 2, "offload_optimizer": "cpu"}), 2, sdxl)
    for name in ("fp32 master", "optimizer state", "retain gradient"):
        assert row(offload.rows, name).device == 0 < row(offload.rows, name).host


def minicanvas_plan(world: int = 1, **fields: dict) -> tuple[Plan, ModelDescription]:
    cfg = Config.model_validate({"concepts": ["neon style"], "surgery": {"enabled": True}} | fields)
    model = describe_model(cfg)
    return make_plan(cfg, world, model), model


def test_the_smallest_change_is_named() -> None:
    few = {"batch_size": 1}  # so that the largest window is that which has the retain gradient
    plan, model = minicanvas_plan(retain=few)
    one_smaller = minicanvas_plan(surgery={"enabled": True, "retain_dtype": "int8"}, retain=few)[0]
    assert one_smaller.device < plan.device
    alone = smallest_change(plan, model, ALLOWANCE + one_smaller.device)
    assert alone is not None and alone.changes == ("--surgery.retain_dtype int8",)
    assert smallest_change(plan, model, ALLOWANCE) is None


def test_changes_together_are_no_more_than_needed() -> None:
    plan, model = minicanvas_plan()
    less, eight_bit = {"gradient_checkpointing": True}, {"name": "adamw8bit"}
    single = [minicanvas_plan(model=less)[0].device, minicanvas_plan(optimizer=eight_bit)[0].device]
    limit = ALLOWANCE + minicanvas_plan(model=less, optimizer=eight_bit)[0].device
    assert all(ALLOWANCE + device > limit for device in single)
    found = smallest_change(plan, model, limit)
    assert found is not None and found.fits(limit)
    changes = list(_changes(plan, model))
    taken = [change for change in changes if str(change) in found.changes]
    for change in taken if len(taken) > 1 else []:
        fewer = apply(plan, model, tuple(other for other in taken if other != change))
        assert fewer is None or not fewer.fits(limit)


@pytest.fixture
def same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command prepares a process of its own; this one has other tests to run."""
    monkeypatch.setattr("fastunlearn.utils.environment.prepare_environment", lambda threads: None)


@pytest.mark.usefixtures("same_environment")
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *MINICANVAS]) == 0
    out = capsys.readouterr().out
    assert "5,495,524 parameters" in out and "optimizer state (adamw)" in out and "U-Net evaluations" in out
    assert cli.main(["plan", *MINICANVAS, "--vram", "24", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["fits"] is True and data["fits_with"] is None and data["limit_bytes"] == 24 * GIB
    assert data["device_bytes"] == max(phase["device"] for phase in data["phases"].values())
    assert cli.main(["plan", *MINICANVAS, "--vram", "1.02"]) == 1
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.usefixtures("same_environment")
def test_a_folder_without_a_unet_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--concepts", "cat", "--pretrained_model_name_or_path", str(tmp_path)]) == 2
    assert "unet/config.json" in capsys.readouterr().err
