"""The main job as a user starts it: what a run leaves, kill and resume, and the wrong inputs.

Every test starts `train.py` as a process of its own on the embedded model, with few updates and few sampler steps: the
first run, and what is refused before torch is loaded, as a shell does, all others forked.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import forked
import pytest
import torch
from checkpoints import change_state, sign
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from fastunlearn.config import load_config
from fastunlearn.export.formats.delta import apply_delta, load_delta
from fastunlearn.minicanvas import pipeline_path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "fastunlearn" / "train.py"
SHORT = [
    "--concepts", "neon style", "--train.max_train_steps", "8", "--sampler.num_inference_steps", "10",
    "--train.learning_rate", "1e-3", "--train.cpu_threads", "1", "--evaluation.mode", "off",
    "--progress.enabled", "false",
    "--evaluation.num_inference_steps", "2", "--report.num_validation_seeds", "1",
]  # fmt: skip


def words(out: Path, *more: str) -> list[str]:
    return [str(TRAIN), *SHORT, "--output_dir", str(out), *more]


def run(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return forked.run(words(out, *more), out.parent / "printed", cwd=out.parent)


def run_afresh(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words(out, *more)]
    # From another folder: neither the source tree nor its parent may be needed on the path.
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=out.parent, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    done = run_afresh(out, "--checkpointing_steps", "2", "--checkpoints_total_limit", "2")
    assert done.returncode == 0, done.stderr
    noise = [line for line in done.stderr.splitlines() if "warn" in line.lower() or "error" in line.lower()]
    assert not noise, noise
    assert "DeepSpeed" not in done.stdout
    return out


def test_a_run_leaves_everything_that_the_design_lists(finished: Path) -> None:
    left = {path.name for path in finished.iterdir()}
    assert left >= {
        "config.toml", "unet", "delta.safetensors", "metrics.json", "train_log.jsonl", "samples", "README.md", "logs",
    }  # fmt: skip
    assert {name for name in left if name.startswith("checkpoint-")} == {"checkpoint-4", "checkpoint-6"}
    assert not list(finished.glob("*.partial*"))
    assert (finished / "samples" / "before_after.png").stat().st_size > 2000
    assert list((finished / "logs").glob("events*"))
    metrics = json.loads((finished / "metrics.json").read_text())
    counts = metrics["unet_evaluations"]
    assert metrics["updates"] == 8 and counts["student_backward"] == 16 and counts["teacher"] == 24
    assert counts["total"] == sum(
        counts[name] for name in ("teacher", "rollout", "student_forward", "student_backward")
    )
    assert set(metrics["seconds"]) == {"total", "rollout", "probe", "train"}
    assert metrics["zero_stage"] == 1 and metrics["world_size"] == 1 and metrics["evaluation"] is None
    log = [json.loads(line) for line in (finished / "train_log.jsonl").read_text().splitlines()]
    assert [entry["update"] for entry in log] == list(range(8))
    assert all(entry["loss"] > 0 and entry["unlearn_grad_norm"] > 0 and entry["lr"] == 1e-3 for entry in log)
    assert load_config(str(finished / "config.toml"), []).train.scope == "attn2"


def test_only_the_scope_has_changed_and_the_delta_says_how(finished: Path) -> None:
    base = UNet2DConditionModel.from_pretrained(pipeline_path(), subfolder="unet")
    edited = UNet2DConditionModel.from_pretrained(finished, subfolder="unet")
    before, after = base.state_dict(), edited.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    delta, header = load_delta(finished / "delta.safetensors")
    assert changed and changed <= set(delta)
    assert all("attn2" in name for name in delta)
    assert header["concepts"] == "neon style" and header["method"] == "kscu"
    apply_delta(base, finished / "delta.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in base.state_dict().items())


def kill_and_resume(out: Path, arguments: tuple[str, ...], updates_before_the_kill: int) -> None:
    """Start a run, kill it without notice after so many updates, and let it go on."""
    process = forked.start(words(out, *arguments), Path(os.devnull), Path(os.devnull), cwd=out.parent)
    assert process.pid is not None
    deadline = time.time() + 300
    log = out / "train_log.jsonl"
    while time.time() < deadline and process.exitcode is None:
        if log.exists() and log.read_text().count("\n") >= updates_before_the_kill:
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    resume(out, arguments)


def resume(out: Path, arguments: tuple[str, ...]) -> None:
    assert list(out.glob("checkpoint-*")), "killed before the first checkpoint"
    assert not (out / "unet").exists(), "killed after the end"
    done = run(out, *arguments, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr


def assert_same_end(one: Path, other: Path) -> None:
    whole = load_file(one / "unet" / "diffusion_pytorch_model.safetensors")
    resumed = load_file(other / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    entries = [json.loads(line)["update"] for line in (other / "train_log.jsonl").read_text().splitlines()]
    assert entries == list(range(8))
    counts = [json.loads((path / "metrics.json").read_text())["unet_evaluations"] for path in (one, other)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("updates_before_the_kill", [3, 7])
def test_killed_and_resumed_it_ends_with_the_same_bits(
    finished: Path, tmp_path: Path, updates_before_the_kill: int
) -> None:
    out = tmp_path / "out"
    kill_and_resume(out, ("--checkpointing_steps", "2", "--train.logging_steps", "1"), updates_before_the_kill)
    assert_same_end(finished, out)


RETAIN = ("--retain.num_images", "3", "--retain.num_inference_steps", "2", "--retain.batch_size", "1")
WITH_STATE = {
    "surgery with a running mean in 8 bits": (
        "--surgery.enabled", "true", "--surgery.retain_ema", "0.9", "--surgery.retain_dtype", "int8",
        "--surgery.rho", "1", *RETAIN,
    ),
    "surgery on trajectories": ("--surgery.enabled", "true", "--retain.source", "prompts", "--retain.batch_size", "1"),
    "doco": (
        "--method", "doco", "--doco.discriminator_warmup", "3", "--prompts.anchor_templates", "a picture of a cat",
        "--prompts.templates", "a picture of a cat in {concept}", *RETAIN,
    ),
    "surgery with fp32 masters of bf16 weights": (
        "--surgery.enabled", "true", "--mixed_precision", "bf16", "--zero.stage", "2", *RETAIN,
    ),
    "the fused engine in 8 bits": (
        "--engine", "fused", "--mixed_precision", "bf16", "--optimizer.name", "adamw8bit", "--surgery.enabled", "true",
        *RETAIN,
    ),
    "a meta term beside surgery": (
        "--meta.enabled", "true", "--meta.every", "2", "--meta.num_images", "4", "--meta.batch_size", "1",
        "--meta.inner_batch_size", "1", "--meta.restart_every", "4", "--surgery.enabled", "true", *RETAIN,
    ),
}  # fmt: skip
CHECKPOINTS = ("--checkpointing_steps", "2", "--train.logging_steps", "1")
# Ends its process as a power cut would, right after a method of a class was called so many times.
KILLED = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
from fastunlearn.utils.environment import prepare_environment
prepare_environment(1)
import importlib
from fastunlearn.train import main
module, name, method, count = sys.argv[1:5]
owner, calls = getattr(importlib.import_module(module), name), []
real = getattr(owner, method)
def fatal(self, *arguments):
    real(self, *arguments)
    calls.append(1)
    if len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, method, fatal)
main(sys.argv[5:])
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def trained(case: str) -> Path:
        out = tmp_path_factory.mktemp("whole") / "out"
        done = run(out, *WITH_STATE[case], *CHECKPOINTS)
        assert done.returncode == 0, done.stderr
        assert (out / "samples" / "surgery.png").stat().st_size > 2000
        return out

    return trained


@pytest.mark.slow
@pytest.mark.parametrize("case", WITH_STATE)
def test_what_methods_carry_on_is_resumed_too(case: str, uninterrupted: Callable[[str], Path], tmp_path: Path) -> None:
    kill_and_resume(tmp_path / "out", (*WITH_STATE[case], *CHECKPOINTS), 5)
    assert_same_end(uninterrupted(case), tmp_path / "out")


# Between the retain and the unlearning window of update 5, and while the weights are those of a simulated attack in
# update 6, the fourth that has one.
MOMENTS = {
    "surgery with a running mean in 8 bits": (
        ("fastunlearn.gradients.transforms", "GradientTransforms", "store", "6"), 5,
    ),
    "a meta term beside surgery": (("fastunlearn.meta.inner_loop", "InnerLoop", "_fine_tune", "4"), 6),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", MOMENTS)
def test_killed_in_the_middle_of_an_update_it_ends_with_the_same_bits(
    case: str, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    out, driver = tmp_path / "out", tmp_path / "driver.py"
    arguments, (place, updates) = (*WITH_STATE[case], *CHECKPOINTS), MOMENTS[case]
    driver.write_text(KILLED)
    _, *options = words(out, *arguments)
    died = forked.run([str(driver), *place, *options], tmp_path)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert (out / "train_log.jsonl").read_text().count("\n") == updates
    resume(out, arguments)
    assert_same_end(uninterrupted(case), out)


def one_line_refusal(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_a_checkpoint_of_another_run_or_world_is_refused(finished: Path, tmp_path: Path) -> None:
    state_file = finished / "checkpoint-6" / "state.json"
    original = state_file.read_text()
    before = sorted(path.name for path in finished.iterdir())
    latest = ("--resume_from_checkpoint", "latest")
    try:
        one_line_refusal(run(finished, *latest, "--learning_rate", "1e-4"), "train.learning_rate", "0.001", "0.0001")
        change_state(state_file.parent, world_size=2)
        one_line_refusal(run(finished, *latest, "--use_8bit_adam"), "2 rank", "--num_gpus 2")
        state_file.write_text("{")
        one_line_refusal(run(finished, "--resume_from_checkpoint", "checkpoint-6"), "checkpoint-6", "state.json")
    finally:
        state_file.write_text(original)
        sign(state_file.parent)
    assert sorted(path.name for path in finished.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--train.lerning_rate", "1"], ["lerning_rate", "learning_rate"]),
        (["--train.max_train_steps", "many"], ["max_train_steps", "many"]),
        (["--concepts", "cat, fish"], ["concepts", "cat; fish"]),
        (["--keep", "neon"], ["neon"]),
        (["--model.pretrained_model_name_or_path", "./no/such/folder"], ["no/such/folder"]),
        (["--resume_from_checkpoint", "latest"], ["checkpoint"]),
        (["--output_dir", "/proc/nowhere"], ["output_dir"]),
        (["--config", "missing.toml"], ["missing.toml"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], said: list[str], tmp_path: Path) -> None:
    started = time.process_time()
    one_line_refusal(run_afresh(tmp_path / "out", *arguments), *said)
    assert not (tmp_path / "out").exists()
    assert time.process_time() - started < 30


def test_a_finished_run_is_not_overwritten_unless_told_to(finished: Path) -> None:
    before = (finished / "metrics.json").read_text()
    one_line_refusal(run(finished), "overwrite_output_dir")
    assert (finished / "metrics.json").read_text() == before


def test_more_ranks_than_cores_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4096", "LOCAL_WORLD_SIZE": "4096"}
    command = [sys.executable, *words(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | world, check=False)
    one_line_refusal(done, "4096")


def test_a_loss_that_is_not_finite_stops_the_run_and_exports_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(out, "--learning_rate", "1e30")
    assert done.returncode == 2, done.stderr
    assert "not finite" in done.stderr and "Traceback" not in done.stderr
    assert not (out / "unet").exists()


def test_a_run_that_changes_nothing_says_so_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(out, "--learning_rate", "1e-30", "--max_train_steps", "2")
    said = "Nothing was erased: no weight differs from the base model's."
    assert said in done.stdout, done.stderr
    card = [line for line in (out / "README.md").read_text().splitlines() if line]
    assert card[card.index("# minicanvas, unchanged") + 1] == f"**{said}**"
    changes = json.loads((out / "metrics.json").read_text())["changes"]
    assert changes["changed"] == 0 and changes["weights"] > 0


def test_evaluate_measures_what_the_run_left(finished: Path, tmp_path: Path) -> None:
    measured = tmp_path / "measured"
    shutil.copytree(finished / "unet", measured / "unet")
    config = (finished / "config.toml").read_text()
    few, enough = "num_inference_steps = 2\n", "num_inference_steps = 6\n"
    assert config.count(few) == 1
    (measured / "config.toml").write_text(config.replace(few, enough))
    evaluate = ["-m", "fastunlearn.cli", "evaluate", "--quick", "--model"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = forked.run([*evaluate, str(measured), "--json"], tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for when in ("before", "after"):
        figures = result[when]
        low, high = figures["intervals"]["UA"]
        assert 0 <= low <= figures["UA"] <= high <= 1
        assert figures["protocol"]["num_inference_steps"] == 6 and figures["protocol"]["quick"]
    assert (measured / "evaluation.json").is_file()
    one_line_refusal(forked.run([*evaluate, str(tmp_path)], tmp_path), "config.toml")
    refused = forked.run([*evaluate, str(finished)], tmp_path, env=environment)
    assert "recognises what the unedited model was asked to draw in" in refused.stderr, "two steps are too few for that"
    assert refused.returncode == 2 and not (finished / "evaluation.json").exists()
