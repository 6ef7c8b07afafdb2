"""Presets: the files of ``configs/`` by name, in every place that takes a configuration."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from fastunlearn import cli
from fastunlearn.config import config_from_arguments, load_config

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["presets", *words]) == 0
    return capsys.readouterr().out


def test_the_list_has_every_file_below_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    groups = printed(capsys).split("\n\n")
    rows = {line.split()[0]: group.splitlines()[0] for group in groups[:-1] for line in group.splitlines()[1:]}
    assert set(rows) == {file.stem.replace("_", "-") for file in CONFIGS}
    assert rows["minicanvas-style"] == "for minicanvas:"
    assert rows["sdxl-24gb-style"] == "for stabilityai/stable-diffusion-xl-base-1.0:"


def test_the_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(printed(capsys, "--json"))
    assert [Path(preset["file"]).name for preset in listed] == [file.name for file in CONFIGS]
    assert all(preset["title"].startswith("Erase ") and len(preset["title"]) <= 120 for preset in listed)


def test_one_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    file = next(file for file in CONFIGS if file.stem == "sdxl_12gb_style")
    for name in ("sdxl-12gb-style", "sdxl_12gb_style"):
        assert printed(capsys, name) == file.read_text(encoding="utf-8")
    assert json.loads(printed(capsys, "sdxl-12gb-style", "--json")) == tomllib.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_name_is_as_good_as_its_file(file: Path) -> None:
    more = ["--seed", "7"]
    expected = load_config(str(file), more)
    assert config_from_arguments(["--preset", file.stem.replace("_", "-"), *more]) == expected
    assert config_from_arguments([f"--config={file}", *more]) == expected


def test_another_model_takes_nothing_of_the_presets_own_files() -> None:
    words = ["--preset", "sdxl-24gb-style", "--pretrained_model_name_or_path", "m.safetensors"]
    model = config_from_arguments(words).model
    assert (model.pretrained_model_name_or_path, model.variant) == ("m.safetensors", None)
