"""Runs that are probed, as a user starts them: how they end, what they say, and that they go on where they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "fastunlearn" / "train.py"
SHORT = (
    "--concepts", "cat", "--train.cpu_threads", "1",
    "--evaluation.mode", "off", "--evaluation.num_inference_steps", "2", "--report.num_validation_seeds", "1",
    "--report.report_to", "none", "--progress.pairs", "4", "--progress.num_inference_steps", "3",
    "--export.dtype", "fp32",
)  # fmt: skip
EASILY = ("--progress.share", "0.01", "--progress.quantile", "-100")


def run(out: Path, *options: str) -> Any:
    scope = () if "uce" in options else ("--train.scope", "attn2")
    return forked.run([str(TRAIN), *SHORT, *scope, "--output_dir", str(out), *options], out.parent)


def metrics(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def not_erased(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("watched") / "out"
    return out, run(out, "--train.max_train_steps", "6", "--checkpointing_steps", "1", "--progress.every", "2")


def test_what_is_not_erased_is_said_first_and_by_the_status(not_erased: tuple[Path, Any]) -> None:
    out, done = not_erased
    assert done.returncode == 3 and "Traceback" not in done.stderr
    found = metrics(out)
    assert found["progress"]["erased"] is False and found["progress"]["ended"] == "updates" and found["updates"] == 6
    card = (out / "README.md").read_text()
    first = next(line for line in card.splitlines() if line.startswith("**"))
    assert first.startswith("**Not erased: ") and "6 of at most 6 updates" in first and first[2:30] in done.stdout
    assert {path.name for path in out.iterdir()} >= {"unet", "delta.safetensors", "progress.jsonl", "samples"}
    assert (out / "samples" / "progress.png").stat().st_size > 5000
    log = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    assert [row["update"] for row in log] == [2, 4, 6] and log == found["progress"]["probes"]
    pictures = 4 + 2
    full, glance = 2 * pictures * 3, 2 * 2 * 3
    glances = sum(row["drift"] is None for row in log)
    assert found["unet_evaluations"]["probe"] == 4 * pictures * 3 + glances * glance + (3 - glances) * full


def test_it_stops_when_what_was_asked_for_holds_twice(tmp_path: Path) -> None:
    done = run(tmp_path / "out", *EASILY, "--progress.in_a_row", "2", "--train.max_train_steps", "120")
    found = metrics(tmp_path / "out")
    if not found["progress"]["erased"]:
        pytest.fail(done.stderr)
    assert done.returncode == 0 and found["progress"]["ended"] == "erased" and found["updates"] < 120
    assert "of at most 120 updates" in done.stdout and "Erased: " in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("checkpoint", [2, 4, 5])
def test_killed_at_a_probe_or_between_it_goes_on_to_the_same_bits(
    checkpoint: int, not_erased: tuple[Path, Any], tmp_path: Path
) -> None:
    out, _ = not_erased
    again = tmp_path / "out"
    options = ("--train.max_train_steps", "6", "--progress.every", "2", "--checkpointing_steps", "1")
    cut = run(again, *options, "--checkpoint.checkpoints_total_limit", "9")
    assert cut.returncode == 3
    for folder in again.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > checkpoint:
            for path in sorted(folder.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            folder.rmdir()
    limit = ("--checkpoint.checkpoints_total_limit", "9")
    assert run(again, *options, *limit, "--resume_from_checkpoint", "latest").returncode == 3
    weights, expected = (load_file(folder / "delta.safetensors") for folder in (again, out))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in expected.items())
    resumed, whole = metrics(again), metrics(out)
    assert resumed["progress"] == whole["progress"] and resumed["unet_evaluations"] == whole["unet_evaluations"]
    assert (again / "progress.jsonl").read_text() == (out / "progress.jsonl").read_text()


def test_the_best_probes_weights_remain(tmp_path: Path) -> None:
    """Those of a run that simply ends there, whatever the later updates did to it."""
    fields = (*EASILY, "--progress.every", "1", "--progress.in_a_row", "1", "--train.max_train_steps", "3")
    run(tmp_path / "long", *fields, "--progress.max_drift", "1e-9")
    found = metrics(tmp_path / "long")["progress"]
    assert found["ended"] == "drift" and found["updates"] == 1
    run(tmp_path / "short", "--train.max_train_steps", "1", "--progress.enabled", "false")
    weights, expected = (load_file(tmp_path / name / "delta.safetensors") for name in ("long", "short"))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in expected.items())


def test_a_closed_form_method_is_probed_once_after_the_edit(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--method", "uce")
    found = metrics(tmp_path / "out")
    assert found["progress"]["ended"] == "edited" and len(found["progress"]["probes"]) == 1
    assert done.returncode == (0 if found["progress"]["erased"] else 3)
    assert found["unet_evaluations"]["probe"] == found["unet_evaluations"]["total"] > 4 * 6 * 3


def test_a_classifier_that_does_not_know_the_model_is_refused(tmp_path: Path) -> None:
    from fastunlearn import cli

    assert cli.main(["doctor", "--make-random", "tiny-sd15", str(tmp_path / "model")]) == 0
    options = ("--pretrained_model_name_or_path", str(tmp_path / "model"), "--progress.classifier", "minicanvas")
    done = run(tmp_path / "out", *options)
    assert done.returncode == 2 and "progress.classifier" in done.stderr and not (tmp_path / "out" / "unet").exists()
