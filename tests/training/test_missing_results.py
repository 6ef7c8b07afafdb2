"""After the last update: the weights are on the disk before anything else, and every other result may fail alone."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file

from fastunlearn import cli
from fastunlearn.utils.run_folder import list_checkpoints

ROOT = Path(__file__).resolve().parents[2]
WORKER, TRAIN = ROOT / "tests" / "workers" / "broken_worker.py", ROOT / "fastunlearn" / "train.py"
DELTA, UNET, PICTURE = "delta.safetensors", "unet", "samples/before_after.png"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    assert cli.main(["doctor", "--make-random", "tiny-sd15", str(tmp_path / "model")]) == 0
    return tmp_path / "model"


def run(what: str, model: Path, *more: str) -> subprocess.CompletedProcess[str]:
    folder = model.parent
    options = [
        "--concepts", "cat", "--pretrained_model_name_or_path", str(model), "--output_dir", str(folder / "out"),
        "--train.max_train_steps", "3", "--sampler.num_inference_steps", "4", "--learning_rate", "1e-3",
        "--train.cpu_threads", "1", "--report.report_to", "none", "--report.num_validation_seeds", "1",
        "--evaluation.num_inference_steps", "2", "--progress.enabled", "false", *more,
    ]  # fmt: skip
    (folder / "temporary").mkdir(exist_ok=True)
    program = [str(WORKER), what] if what else [str(TRAIN)]
    return forked.run([*program, *options], folder, env=os.environ | {"TMPDIR": str(folder / "temporary")})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / DELTA)


def assert_same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    """But for the type: what could not be compared with the base model's files was kept in fp32."""
    assert weights
    assert all(torch.equal(tensor, others[name].to(tensor.dtype)) for name, tensor in weights.items())


def assert_missing(done: subprocess.CompletedProcess[str], missing: list[str], *said: str) -> None:
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: not all results are there; missing: {', '.join(missing)}; "), done.stderr
    assert not [words for words in said if words not in last], last


def test_the_base_model_is_gone_when_it_is_read_again(model: Path) -> None:
    out = model.parent / "out"
    done = run("base_gone", model, "--checkpointing_steps", "2")
    assert_missing(done, [UNET, PICTURE], str(out / DELTA), "--resume_from_checkpoint latest")
    assert {path.name for path in out.iterdir()} >= {DELTA, "README.md", "metrics.json", "checkpoint-3"}
    kept = weights_of(out)
    (model.parent / "unmounted").rename(model)
    again = run("", model, "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest")
    assert again.returncode == 0, again.stderr
    whole, exported = weights_of(out), load_file(out / UNET / "diffusion_pytorch_model.safetensors")
    assert whole.keys() == kept.keys()
    assert_same(whole, kept)
    assert_same(whole, exported)
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-2"], "the last state is needed no longer"
    assert len((out / "train_log.jsonl").read_text().splitlines()) == 3


def test_the_output_folder_takes_no_weights(model: Path) -> None:
    done = run("full_folder", model)
    (kept,) = (model.parent / "temporary").glob(f"fastunlearn-*/{DELTA}")
    assert_missing(done, [UNET, DELTA], str(kept), "--overwrite_output_dir")
    assert "the trained weights are in" in done.stderr and load_file(kept)


@pytest.mark.parametrize(("what", "missing"), [("no_pictures", PICTURE), ("no_scores", "evaluation scores")])
def test_a_result_fails_alone(what: str, missing: str, model: Path) -> None:
    out = model.parent / "out"
    done = run(what, model)
    remedy = "fastunlearn evaluate --model" if what == "no_scores" else "--overwrite_output_dir"
    assert_missing(done, [missing], str(out / DELTA), remedy)
    assert f"warning: {missing} is missing: CUDA out of memory, say" in done.stderr
    there = {UNET, DELTA, "README.md", "metrics.json", *(() if what == "no_pictures" else ["samples"])}
    assert {path.name for path in out.iterdir()} >= there
    assert json.loads((out / "metrics.json").read_text())["evaluation"] is None


def test_what_replaces_another_run_and_is_not_whole_leaves_that_one(model: Path) -> None:
    out = model.parent / "out"
    assert run("", model).returncode == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = run("often_without_base", model, "--overwrite_output_dir", "--train.learning_rate", "1e-2")
    assert_missing(done, [UNET, PICTURE], str(out / "unfinished" / DELTA), "the earlier results stay", "latest")
    assert {path: path.read_bytes() for path in before} == before
    kept = weights_of(out / "unfinished")
    (model.parent / "unmounted").rename(model)
    again = run("", model, "--train.learning_rate", "1e-2", "--resume_from_checkpoint", "latest")
    assert again.returncode == 0, again.stderr
    assert not (out / "unfinished").exists() and not list_checkpoints(out)
    assert_same(weights_of(out), kept)


def test_a_long_run_keeps_its_last_state_until_all_results_are_there(model: Path) -> None:
    out = model.parent / "out"
    assert_missing(run("often_without_base", model), [UNET, PICTURE], "--resume_from_checkpoint latest")
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-3"]
    (model.parent / "unmounted").rename(model)
    again = run("often", model, "--resume_from_checkpoint", "latest")
    assert again.returncode == 0 and not list_checkpoints(out), again.stderr
