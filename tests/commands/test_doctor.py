"""``fastunlearn doctor``: the report, and models with random weights in the sizes of the published ones."""

from __future__ import annotations

import hashlib
import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fastunlearn import cli
from fastunlearn.models.formats.completeness import component_shapes
from fastunlearn.models.formats.folder_configs import PUBLIC_MODELS
from fastunlearn.models.formats.headers import check_safetensors
from fastunlearn.models.formats.random_weights import Tensorlike, write_safetensors

# As published; CLIP's and the VAE's are those of the files on the hub.
CLIP_L, CLIP_H, BIG_G, VAE = 123_060_480, 340_387_840, 694_659_840, 83_653_863
PUBLISHED = {
    "sdxl": {"unet": 2_567_463_684, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": BIG_G},
    "sd15": {"unet": 859_520_964, "vae": VAE, "text_encoder": CLIP_L},
    "sd21": {"unet": 865_910_724, "vae": VAE, "text_encoder": CLIP_H},
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_full_sizes_are_the_published_ones(kind: str) -> None:
    shapes = component_shapes(PUBLIC_MODELS[kind])
    assert {name: sum(math.prod(s) for s in part.values()) for name, part in shapes.items()} == PUBLISHED[kind]
    small = component_shapes(PUBLIC_MODELS[kind].with_small_text_encoders())
    assert small["unet"] == shapes["unet"]
    assert small["text_encoder"].items() < shapes["text_encoder"].items()  # the same widths, fewer layers


@pytest.mark.parametrize("kind", ["tiny-sdxl", "tiny-sd15", "tiny-sd21"])
def test_the_parameters_of_the_tables_are_those_of_the_models(kind: str) -> None:
    shapes = component_shapes(PUBLIC_MODELS[kind])["unet"]
    assert sum(math.prod(shape) for shape in shapes.values()) == PUBLIC_MODELS[kind].unet_parameters


def digest(folder: Path) -> str:
    files = sorted(folder.rglob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def test_a_folder_follows_from_kind_and_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def make(name: str, *more: str) -> Path:
        assert cli.main(["doctor", "--make-random", "tiny-sd21", str(tmp_path / name), *more]) == 0
        return tmp_path / name

    first = make("a")
    printed = capsys.readouterr().out
    assert "1,106,212 parameters" in printed and "fp16" in printed and "v_prediction" in printed
    assert check_safetensors(first / "unet" / "diffusion_pytorch_model.safetensors") == 1_106_212
    assert digest(make("b")) == digest(first) != digest(make("c", "--seed", "1"))
    with safe_open(make("d", "--dtype", "bf16") / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        weight = file.get_tensor("conv_in.weight")
    assert weight.dtype == torch.bfloat16 and 0.5 < weight.float().abs().max() * 6 <= 1.01  # 4 channels, 3 x 3 points


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def make() -> Tensor:
        assert sum(reference() is not None for reference in alive) <= 1
        made = torch.ones(50)
        alive.append(weakref.ref(made))
        return made

    tensors = {str(number): Tensorlike((5, 10), make) for number in range(10)}
    write_safetensors(tmp_path / "x.safetensors", tensors, torch.float32)
    assert check_safetensors(tmp_path / "x.safetensors") == 500


def test_single_file_beside_the_folder(tmp_path: Path) -> None:
    make_random = ["doctor", "--make-random", "tiny-sdxl", str(tmp_path / "d")]
    assert cli.main([*make_random, "--single-file", str(tmp_path / "m.safetensors"), "--json"]) == 0
    folder = sum(check_safetensors(file) for file in (tmp_path / "d").rglob("*.safetensors"))
    assert check_safetensors(tmp_path / "m.safetensors") == folder


BAD = [
    (["--make-random", "sdxk", "x"], ("'sdxk'", "nearest: sdxl", "tiny-sd21")),
    (["--make-random", "sdxl"], ("--make-random", "2 arguments")),
    (["--seed", "3"], ("--seed", "--make-random")),
    (["--make-random", "tiny-sd15", "{tmp}"], ("exists", "new folder")),
    (["--make-random", "tiny-sd15", "{tmp}/d", "--seed", "-1"], ("--seed", "-1")),
    (["--make-random", "tiny-sd15", "{tmp}/d", "--dtype", "fp8"], ("--dtype", "'fp8'")),
    (["--make-random", "tiny-sd15", "{tmp}/d", "--single-file", "{tmp}/x.ckpt"], ("--single-file", ".safetensors")),
    (["--make-random", "tiny-sd15", "{tmp}/d", "--single-file", "{tmp}/there.safetensors"], ("exists", "new name")),
    (
        ["--make-random", "sdxl", "{tmp}/d", "--single-file", "{tmp}/x.safetensors", "--small-text-encoders"],
        ("--small-text-encoders", "whole text encoders"),
    ),
]


@pytest.mark.parametrize(("argv", "words"), BAD)
def test_what_cannot_be_is_refused(
    argv: list[str], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.safetensors").write_text("precious")
    assert cli.main(["doctor", *(word.replace("{tmp}", str(tmp_path)) for word in argv)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not [word for word in words if word not in error], error
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]


def test_a_small_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = type("Usage", (), {"free": 7 * 2**30})
    monkeypatch.setattr("fastunlearn.commands.doctor.shutil.disk_usage", lambda _: usage)
    assert cli.main(["doctor", "--make-random", "sdxl", str(tmp_path / "d")]) == 2
    assert "7.0 GiB free, and sdxl in fp16 needs up to 7.2 GiB" in capsys.readouterr().err


def test_the_report_says_what_is_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__ and found["gpus"] == []
    assert found["attention"]["auto"] == "yes" and found["attention"]["flash3"].startswith("no: ")
    assert found["optimizers"]["adamw"] == "yes" and found["optimizers"]["paged_adamw8bit"].startswith("no: ")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out and "GPU" in out and "none" in out
