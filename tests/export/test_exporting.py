"""Exporting: weights that diffusers loads, delta files, the before/after picture and the model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from fastunlearn.config import Config, load_config
from fastunlearn.errors import UserError
from fastunlearn.evaluation.classifiers.base import Label
from fastunlearn.evaluation.classifiers.minicanvas_grid import build_grid
from fastunlearn.evaluation.metrics.scores import score
from fastunlearn.evaluation.pictures.grid import Erased
from fastunlearn.export import samples
from fastunlearn.export.card import usage, write_card
from fastunlearn.export.formats.delta import apply_delta, delta_metadata, load_delta, write_delta
from fastunlearn.export.formats.unet import write_unet
from fastunlearn.export.samples import (
    SampleRow,
    ValidationRow,
    before_after,
    before_after_grid,
    choose_validation_rows,
)


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=2, layers_per_block=1,
    )  # fmt: skip


def a_run(**changes: object) -> Config:
    base: dict[str, object] = {"concepts": ["neon style"], "keep": ["ink style"], "output_dir": "out/neon"}
    return Config.model_validate(base | changes)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_unet_is_loaded_by_diffusers_with_the_given_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    unet = tiny_unet()
    state = {name: tensor + 0.125 for name, tensor in unet.state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    write_unet(unet, tmp_path / "unet", dtype, state)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet", torch_dtype=dtype)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, state[name].to(dtype))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in unet.state_dict().items())


def test_writing_again_replaces_the_whole_folder_and_names_no_path(tmp_path: Path) -> None:
    write_unet(tiny_unet(), tmp_path / "unet", torch.float32)
    (tmp_path / "unet" / "stale.safetensors").write_text("old")
    again = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    write_unet(again, tmp_path / "unet", torch.float32)
    assert sorted(file.name for file in (tmp_path / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert str(tmp_path) not in (tmp_path / "unet" / "config.json").read_text()


@pytest.mark.parametrize("value", [float("nan"), 1e6], ids=["nan", "beyond-fp16"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    unet = tiny_unet()
    (tmp_path / "unet").mkdir()
    with torch.no_grad():
        unet.conv_in.weight[0] = value
    with pytest.raises(UserError, match=r"conv_in.weight is not finite in float16"):
        write_unet(unet, tmp_path / "unet", torch.float16)
    assert not list((tmp_path / "unet").iterdir())


def test_delta_round_trip(tmp_path: Path) -> None:
    base, edited = tiny_unet(), tiny_unet()
    edited.load_state_dict(base.state_dict())
    name = "conv_in.weight"
    with torch.no_grad():
        edited.state_dict()[name].add_(1.0)
    write_delta({name: edited.state_dict()[name]}, tmp_path / "delta.safetensors", delta_metadata(a_run()))
    tensors, header = load_delta(tmp_path / "delta.safetensors")
    assert list(tensors) == [name]
    assert header | {"base_model": "minicanvas", "concepts": "neon style", "method": "kscu"} == header
    assert header["format_version"] == "1"
    apply_delta(base, tmp_path / "delta.safetensors")
    assert all(torch.equal(tensor, base.state_dict()[key]) for key, tensor in edited.state_dict().items())


def test_delta_takes_views_and_gradients(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    write_delta({"a": weight.T, "b": weight[0]}, tmp_path / "d.safetensors", {})
    tensors, _ = load_delta(tmp_path / "d.safetensors")
    assert torch.equal(tensors["a"], weight.T) and torch.equal(tensors["b"], weight[0])


def test_a_bad_delta_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    with pytest.raises(UserError, match="cannot read"):
        load_delta(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="cannot read"):
        load_delta(path)
    write_delta({"a": torch.zeros(1)}, path, {"format_version": "9"})
    with pytest.raises(UserError, match="format_version '9'"):
        load_delta(path)
    unet = tiny_unet()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    for wrong in ({"nowhere.weight": torch.zeros(1)}, {"conv_in.bias": torch.zeros(99)}):
        write_delta({"conv_out.bias": torch.ones(4), **wrong}, path, {"base_model": "other/model"})
        with pytest.raises(UserError, match="made for 'other/model'"):
            apply_delta(unet, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


# --- the picture -----------------------------------------------------------------------------------------------------


def test_rows_on_minicanvas_show_erased_neighbouring_and_unrelated() -> None:
    rows = choose_validation_rows(a_run(concepts=["neon style", "cat"], train={"scope": "full"}))
    groups = [row.group for row in rows]
    assert groups == sorted(groups, key=list(samples.GROUPS).index)
    assert {group: groups.count(group) for group in samples.GROUPS} == {"erased": 4, "neighbouring": 4, "unrelated": 4}
    for row in rows:
        assert any(word in row.prompt for word in ("neon", "cat")) == (row.group == "erased")


def test_rows_elsewhere_come_from_the_configuration() -> None:
    cfg = a_run(
        concepts=["Van Gogh style"],
        keep=["Monet style"],
        model={"pretrained_model_name_or_path": "org/model"},
        report={"validation_prompts": ["a street", "a street in Van Gogh style"]},
    )
    assert choose_validation_rows(cfg) == [
        ValidationRow("erased", "Van Gogh style"),
        ValidationRow("erased", "a street in Van Gogh style"),
        ValidationRow("neighbouring", "Monet style"),
        ValidationRow("unrelated", "a street"),
    ]


def row(group: str, size: int = 64, seeds: int = 2) -> SampleRow:
    before = torch.zeros(seeds, 3, size, size)
    before[:, 0] = 1
    return SampleRow(group, f"a very long prompt about a {group} thing in some style", before, before.flip(1))


@pytest.mark.parametrize(("size", "tile"), [(64, 128), (16, 128), (1024, 256)])
def test_picture_has_a_cell_for_every_row_seed_and_model(tmp_path: Path, size: int, tile: int) -> None:
    rows = [row(group, size) for group in ("erased", "erased", "neighbouring", "unrelated")]
    before_after_grid(rows, tmp_path / "samples" / "before_after.png", ["seed 188", "seed 288"])
    with Image.open(tmp_path / "samples" / "before_after.png") as picture:
        colours = {colour: count for count, colour in picture.convert("RGB").getcolors(1 << 20) or []}
        width, height = picture.size
    assert colours[(255, 0, 0)] == colours[(0, 0, 255)] == 4 * 2 * tile * tile
    assert width > 4 * tile + 100 and height > 4 * tile + 100
    assert width < 4 * tile + 400 and height < 4 * tile + 300


def test_both_models_draw_from_the_same_noise_and_the_unet_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pipe:
        unet = own = nn.Linear(1, 1)

    calls = []

    def fake_generate(pipe: Pipe, prompts: list[str], seeds: list[int], *_: object) -> Tensor:
        calls.append((pipe.unet, prompts, seeds))
        return torch.rand(len(prompts), 3, 64, 64)

    monkeypatch.setattr(samples, "generate", fake_generate)
    edited, pipe = nn.Linear(1, 1), Pipe()
    rows = [ValidationRow("erased", "neon"), ValidationRow("unrelated", "cat")]
    before_after(pipe, edited, rows, tmp_path / "p.png", seeds=[188, 288])
    assert [call[0] for call in calls] == [Pipe.own, edited]
    assert all(call[1:] == (["neon", "neon", "cat", "cat"], [188, 288, 188, 288]) for call in calls)
    assert pipe.unet is Pipe.own and (tmp_path / "p.png").is_file()


# --- the card --------------------------------------------------------------------------------------------------------


def figures(concept: Erased, erased: bool) -> dict:
    grid = build_grid([concept])
    seen = [
        Label("other" if erased and c.concept and concept.kind == "object" else c.object,
                "ink" if erased and c.concept and concept.kind == "style" else c.style)
        for c in grid.samples
    ]  # fmt: skip
    return score(list(zip(grid.samples, seen, strict=True)), [concept]) | {"protocol": grid.describe()}


def metrics_of(concept: Erased) -> dict:
    return {
        "updates": 500,
        "seconds": {"total": 61.2, "rollout": 10.0, "train": 50.0},
        "unet_evaluations": {"teacher": 1000, "rollout": 200, "student_forward": 500, "student_backward": 500},
        "world_size": 2,
        "zero_stage": 1,
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "evaluation": {"before": figures(concept, False), "after": figures(concept, True)},
    }


def test_card_states_what_was_done_and_what_was_measured(tmp_path: Path) -> None:
    write_card(a_run(), metrics_of(Erased("neon", "style")), tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text()
    for expected in ("neon style", "minicanvas", "2507.06526", "2,200 single-sample", "teacher 1,000", "ink style",
                     "torch 2.13.0", "| UA: ", "| 0.000 | 1.000 | 0.954 to 1.000 | 80 | yes |", "DDIM, eta 0",
                     "188, 288", "Relearning was not tested", "Synonyms were not tested"):  # fmt: skip
        assert expected in card, expected
    assert next(line for line in card.splitlines() if line.startswith("| IRA: ")).endswith("| 140 | no |")
    assert "base_model:" not in card


def test_card_names_what_held_the_rest_and_what_makes_it_last(tmp_path: Path) -> None:
    words = ["--method", "uce", "--concepts", "cat", "--meta.enabled", "true", "--learning_rate", "1e-4"]
    for surgery in (["--surgery.enabled", "true", "--surgery.rho", "2"], []):
        write_card(load_config(None, [*words, *surgery]), {"evaluation": None}, tmp_path / "README.md")
        card = (tmp_path / "README.md").read_text()
        assert ("textbook projection, per tensor; rho 2; 4 samples per rank and micro-batch" in card) == bool(surgery)
        assert "uce.regularisation 0.5" in card and "attn2_kv" in card and "| full |" in card
        assert "4 steps of adamw at 0.0001 (scope: full), starting again every 20 terms; goal: erased" in card
    released = load_config(None, [*words, "--meta.coefficients", "released"])
    write_card(released, {"evaluation": None}, tmp_path / "README.md")
    assert "goal: ascent" in (tmp_path / "README.md").read_text()
    write_card(a_run(), {"evaluation": None}, tmp_path / "README.md")
    assert "against fine-tuning" not in (tmp_path / "README.md").read_text()


def test_card_of_an_object_says_how_synonyms_leak(tmp_path: Path) -> None:
    metrics = json.loads(json.dumps(metrics_of(Erased("cat", "object"))))
    metrics["evaluation"]["after"]["UA_synonym"] = 0.75
    write_card(a_run(concepts=["cat"]), metrics, tmp_path / "README.md")
    assert "25% of the synonym prompts still show the concept" in (tmp_path / "README.md").read_text()


def test_card_without_figures_says_so(tmp_path: Path) -> None:
    cfg = a_run(concepts=["nudity"], keep=[], model={"pretrained_model_name_or_path": "org/model", "variant": "fp16"})
    write_card(cfg, {"evaluation": None}, tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text()
    assert "None were measured" in card and "no safety filter" in card and "base_model: org/model" in card
    assert "variant='fp16'" in card


@pytest.mark.parametrize("model", ["minicanvas", "org/model", "/models/it's here"])
def test_the_cards_code_compiles_and_stands_in_the_card(tmp_path: Path, model: str) -> None:
    cfg = a_run(model={"pretrained_model_name_or_path": model}, output_dir=str(tmp_path / "it's"))
    write_card(cfg, {}, tmp_path / "README.md")
    block = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert block == usage(cfg)
    compile(block, "card", "exec")
    assert 'subfolder="unet"' in block


@pytest.mark.parametrize(("name", "title"), [("ddim", "DDIM"), ("euler", "Euler")])
def test_card_names_the_sampler_of_the_training(tmp_path: Path, name: str, title: str) -> None:
    write_card(a_run(sampler={"name": name}), {"evaluation": None}, tmp_path / "README.md")
    assert f"| sampler in training | {title}, " in (tmp_path / "README.md").read_text()


def test_card_names_no_local_file_as_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    model = {"pretrained_model_name_or_path": "models/mine.safetensors"}
    write_card(a_run(concepts=["cat"], keep=[], model=model), {"evaluation": None}, tmp_path / "README.md")
    assert "base_model:" not in (tmp_path / "README.md").read_text()
