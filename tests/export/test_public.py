"""What leaves the machine: names no folder of it, and is valid JSON, whatever was measured."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import forked
import pytest
import torch

from fastunlearn.errors import MAX_LENGTH, UserError
from fastunlearn.export.formats.delta import apply_delta, load_delta, write_delta
from fastunlearn.minicanvas import pipeline_path
from fastunlearn.models.public_name import public_hash, public_name
from fastunlearn.schema.sections import ModelConfig
from fastunlearn.utils.text import json_text

ROOT = Path(__file__).resolve().parents[2]
STAYS = ("config.toml", "logs", "checkpoint-")
"""What is for the owner of the run, with the folders of this machine in it."""


def test_no_file_that_leaves_tells_where_it_was_made(tmp_path: Path) -> None:
    base, out = tmp_path / "telltale_home" / "my_base", tmp_path / "telltale_runs" / "out"
    shutil.copytree(pipeline_path(), base)
    words = [
        str(ROOT / "fastunlearn" / "train.py"), "--concepts", "cat", "--keep", "fish", "--max_train_steps", "2",
        "--pretrained_model_name_or_path", str(base), "--sampler.num_inference_steps", "4", "--train.cpu_threads", "1",
        "--evaluation.mode", "off", "--evaluation.num_inference_steps", "2", "--report.num_validation_seeds", "1",
        "--progress.enabled", "false",
        "--output_dir", str(out),
    ]  # fmt: skip
    done = forked.run(words, tmp_path / "printed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    leaving = [
        file for file in out.rglob("*") if file.is_file() and not file.relative_to(out).as_posix().startswith(STAYS)
    ]
    assert len(leaving) >= 6
    told = [file.name for file in leaving if b"telltale" in file.read_bytes() or b"/tmp" in file.read_bytes()]
    assert not told
    card = (out / "README.md").read_text()
    digest = public_hash(ModelConfig(pretrained_model_name_or_path=str(base)))
    assert "# my_base" in card and f"my_base, SHA-256 of its files {digest}..." in card and len(digest) == 12
    header = load_delta(out / "delta.safetensors")[1]
    assert (header["base_model"], header["base_sha256"]) == ("my_base", digest)


@pytest.mark.parametrize(
    ("given", "public"),
    [
        ("minicanvas", "minicanvas"),
        ("someone/model", "someone/model"),
        ("/home/someone/models/mine.safetensors", "mine.safetensors"),
        ("../models/mine", "mine"),
        ("~", "model"),
        ("/", "model"),
    ],
)
def test_a_path_is_its_last_part(given: str, public: str) -> None:
    assert public_name(ModelConfig(pretrained_model_name_or_path=given)) == public


def test_numbers_that_json_does_not_have_are_null() -> None:
    value = {"a": [math.nan, 1.0, (math.inf, -math.inf)], "b": {"c": math.nan}, "d": "NaN", "e": 3}
    assert json.loads(json_text(value)) == {"a": [None, 1.0, [None, None]], "b": {"c": None}, "d": "NaN", "e": 3}


@pytest.mark.parametrize("tensor", [torch.tensor([1.0, math.nan]), torch.tensor([math.inf]), torch.tensor([1])])
def test_a_delta_of_anything_but_finite_numbers_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    write_delta({"conv_in.bias": tensor}, tmp_path / "delta.safetensors", {})
    with pytest.raises(UserError, match=r"conv_in.bias is no tensor of finite numbers"):
        load_delta(tmp_path / "delta.safetensors")


def test_a_delta_beyond_the_range_of_the_unet_changes_nothing(tmp_path: Path) -> None:
    write_delta({"weight": torch.ones(1, 2), "bias": torch.tensor([1e6])}, tmp_path / "delta.safetensors", {})
    unet = torch.nn.Linear(2, 1).half()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with pytest.raises(UserError, match=r"float16 cannot hold \(bias\); load the U-Net in torch.float32"):
        apply_delta(unet, tmp_path / "delta.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    apply_delta(unet.float(), tmp_path / "delta.safetensors")
    assert unet.bias.item() == 1e6


@pytest.mark.parametrize("value", ["x" * 10**6, "a\nb\r\x1b[31m", "\udcff", "\u202e", "\0"])
def test_an_error_is_one_line_of_bounded_length(value: str) -> None:
    text = str(UserError(f"field: {value!r} and {value} is wrong; use another"))
    assert len(text) <= MAX_LENGTH + 5 and text.isprintable()
    assert text.startswith("field: ") and text.endswith("use another")
    text.encode()
