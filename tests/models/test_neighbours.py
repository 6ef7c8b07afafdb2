"""What a run keeps that names nothing: near, known to the model, and not the concept under another name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from torch.nn.functional import normalize

from fastunlearn.config import Config, load_config
from fastunlearn.models.description import describe_model
from fastunlearn.models.loading import load_pipeline, resolve_model
from fastunlearn.models.text.neighbours import (
    has_whole_words,
    nearest,
    neighbours,
    with_expected_neighbours,
    with_neighbours,
)
from fastunlearn.planning.plan import make_plan
from fastunlearn.utils.distributed import World

ROOT = Path(__file__).resolve().parents[2]
HERE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder() -> str:
    """The embedded model as one that nobody knows: by its folder."""
    return resolve_model("minicanvas")


@pytest.fixture(scope="module")
def pipeline(folder: str) -> Any:
    return load_pipeline(folder)


def config(folder: str, concepts: str, *options: str) -> Config:
    return load_config(None, ["--concepts", concepts, "--model.pretrained_model_name_or_path", folder, *options])


def test_the_nearest_come_first_and_none_twice() -> None:
    angles = torch.tensor([0.1, 0.9, 0.92, 1.8, 3.0])
    states = torch.stack([angles.cos(), angles.sin()], dim=1)
    erased = normalize(torch.tensor([[1.0, 0.0]]), dim=1)
    assert nearest(states, erased, 9) == [1, 3, 4]  # 0 is the concept itself, 2 is 1 by another name
    assert nearest(states, erased, 2) == [1, 3] and nearest(states, erased, 0) == []
    assert nearest(states[:0], erased, 3) == []


def test_a_name_counts_as_known_where_it_is_not_split(pipeline: Any) -> None:
    assert has_whole_words(pipeline, "watercolor style") and has_whole_words(pipeline, "cat")
    assert not has_whole_words(pipeline, "zebra") and not has_whole_words(pipeline, "stained glass style")


@pytest.mark.parametrize(("concept", "same"), [("cat", "cat"), ("kitty", "cat"), ("yacht", "sailboat")])
def test_neighbours_are_what_the_model_draws_but_not_the_concept(
    folder: str, pipeline: Any, concept: str, same: str
) -> None:
    found = neighbours(config(folder, concept), pipeline, HERE.device)
    styles = [name for name in found if name.endswith(" style")]
    assert same not in found and 5 <= len(found) - len(styles) <= 8 and 5 <= len(styles) <= 8
    assert len(set(found)) == len(found) and all(has_whole_words(pipeline, name) for name in found)
    assert found == neighbours(config(folder, concept), pipeline, HERE.device)


def test_a_name_that_holds_a_word_of_the_concept_is_none(folder: str, pipeline: Any) -> None:
    found = neighbours(config(folder, "pixel style"), pipeline, HERE.device)
    assert not any("pixel" in name for name in found) and "ink style" in found


def test_what_is_named_or_not_wanted_stays_as_it_is(folder: str, pipeline: Any) -> None:
    for options in (["--keep", "tree"], ["--retain.neighbours", "0"]):
        cfg = config(folder, "cat", *options)
        assert with_neighbours(cfg, pipeline, HERE) is cfg and with_expected_neighbours(cfg) is cfg
    assert not config(folder, "cat", "--retain.neighbours", "0").retains
    embedded = load_config(None, ["--concepts", "cat"])
    assert with_neighbours(embedded, pipeline, HERE) is embedded and embedded.retains


def test_a_model_that_knows_none_of_the_names_trains_without_and_says_so(
    folder: str, pipeline: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastunlearn.models.text.neighbours.THINGS", ("zebra",))
    monkeypatch.setattr("fastunlearn.models.text.neighbours.STYLES", ())
    cfg = with_neighbours(config(folder, "cat"), pipeline, HERE)
    assert not cfg.retains and not cfg.keep and "--keep" in capsys.readouterr().err


def test_a_plan_counts_them_before_the_model_is_asked(folder: str) -> None:
    without = config(folder, "cat", "--retain.neighbours", "0")
    plans = [make_plan(cfg, 1, describe_model(cfg)) for cfg in (config(folder, "cat"), without)]
    assert plans[0].evaluations.total > plans[1].evaluations.total and plans[0].cfg.keep == []
    assert with_expected_neighbours(config(folder, "dog")).keep.count("dog") == 0


def test_a_run_names_what_it_kept_and_goes_on_with_the_same(folder: str, tmp_path: Path) -> None:
    short = (
        "--concepts", "cat", "--model.pretrained_model_name_or_path", folder, "--train.cpu_threads", "1",
        "--train.max_train_steps", "4", "--progress.enabled", "false", "--evaluation.mode", "off",
        "--evaluation.num_inference_steps", "2", "--report.num_validation_seeds", "1", "--report.report_to", "none",
        "--checkpointing_steps", "2", "--export.dtype", "fp32", "--output_dir", str(tmp_path / "out"),
    )  # fmt: skip
    train = str(ROOT / "fastunlearn" / "train.py")
    done = forked.run([train, *short], tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    kept = load_config(str(out / "config.toml"), []).keep
    assert "kept, as nothing else is named: " + "; ".join(kept) in done.stdout and "fish" in kept
    assert json.loads((out / "metrics.json").read_text())["unet_evaluations"]["student_backward"] == 4 * (1 + 1)
    before = (out / "delta.safetensors").read_bytes()
    again = forked.run([train, *short, "--resume_from_checkpoint", str(out / "checkpoint-2")], tmp_path)
    assert again.returncode == 0, again.stderr
    assert (out / "delta.safetensors").read_bytes() == before
