"""Whenever a run is stopped or killed, it goes on to the same bits: twelve moments, five ways to train, three signals.

All 180 cases are `make chaos`; every test run has a few of them, one for each moment that is hard to get right.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
import pytest
import torch
from killed_worker import MOMENTS
from launched import free_port, place
from safetensors.torch import load_file

from fastunlearn import cli
from fastunlearn.utils.folders.replacing import working_folder
from fastunlearn.utils.run_folder import list_checkpoints

ROOT = Path(__file__).resolve().parents[2]
WORKER, TRAIN = ROOT / "tests" / "workers" / "killed_worker.py", ROOT / "fastunlearn" / "train.py"
WAYS = {
    "zero 0": (1, ("--zero.stage", "0")),
    "zero 2": (1, ("--zero.stage", "2", "--mixed_precision", "bf16")),
    "zero 3": (1, ("--zero.stage", "3")),
    "fused": (1, ("--engine", "fused")),
    "2 ranks": (2, ("--zero.stage", "2")),
}
SIGNALS = {"TERM": signal.SIGTERM, "INT": signal.SIGINT, "KILL": signal.SIGKILL}
EVERYTHING = [(moment, way, name) for moment in MOMENTS for way in WAYS for name in SIGNALS]
A_FEW = [
    ("before a step", "fused", "TERM"),
    ("a checkpoint is half written", "2 ranks", "KILL"),
    ("after an update", "2 ranks", "TERM"),
    ("a checkpoint has no name yet", "zero 2", "INT"),
    ("the old checkpoint half gone", "fused", "KILL"),
    ("the weights on the disk", "zero 0", "KILL"),
    ("the U-Net half written", "fused", "KILL"),
]
CASES = EVERYTHING if "FASTUNLEARN_CHAOS" in os.environ else A_FEW
SECONDS = 60  # far more than any of this takes; who waits longer waits for ever


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    assert cli.main(["doctor", "--make-random", "tiny-sd15", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def trained(way: str) -> Path:
        out = tmp_path_factory.mktemp("whole") / "out"
        assert run([str(TRAIN)], way, model, out) == [0] * WAYS[way][0], printed(out)
        return out

    return trained


def run(program: list[str], way: str, model: Path, out: Path, *more: str) -> list[int]:
    """The exit statuses of all ranks, which end within seconds of each other."""
    count, arguments = WAYS[way]
    options = [
        "--concepts", "cat", "--pretrained_model_name_or_path", str(model), "--output_dir", str(out),
        "--train.max_train_steps", "6", "--sampler.num_inference_steps", "4", "--learning_rate", "1e-3",
        "--train.cpu_threads", "1", "--train.logging_steps", "1", "--report.report_to", "none",
        "--report.num_validation_seeds", "1", "--evaluation.num_inference_steps", "2", "--evaluation.mode", "off",
        "--progress.enabled", "false",
        "--checkpointing_steps", "2", "--checkpoints_total_limit", "1", *arguments, *more,
    ]  # fmt: skip
    port = free_port()
    ranks = []
    for rank in range(count):
        text = out.parent / f"printed-{rank}"
        env = os.environ | (place(rank, count, port) if count > 1 else {})
        ranks.append(forked.start([*program, *options], text, text, cwd=out.parent, env=env))
    try:
        return [ended(rank, out) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()


def ended(process: BaseProcess, out: Path) -> int:
    deadline = time.monotonic() + SECONDS
    while process.exitcode is None:
        assert time.monotonic() < deadline, printed(out)
        time.sleep(0.02)
    return process.exitcode


def printed(out: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(out.parent.glob("printed-*")))


@pytest.mark.parametrize(("moment", "way", "name"), CASES)
def test_it_goes_on_to_the_same_bits(
    moment: str, way: str, name: str, model: Path, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    out, signum = tmp_path / "out", SIGNALS[name]
    hit = 0 if MOMENTS[moment][-1] else WAYS[way][0] - 1
    statuses = run([str(WORKER), moment, str(int(signum)), str(hit)], way, model, out)
    assert statuses[hit] == (-9 if name == "KILL" else 128 + signum), printed(out)
    done = hit == 0 and moment in ("the U-Net half written", "the card")  # the other rank has nothing more to do
    assert done or 0 not in statuses, statuses
    assert "Traceback" not in printed(out), printed(out)
    known = list_checkpoints(working_folder(out, replaces=False, resumes=True))
    if name != "KILL":
        assert ("latest" in printed(out)) == bool(known) or hit != 0, printed(out)
    again = ("--resume_from_checkpoint", "latest") if known else ("--overwrite_output_dir",)
    assert run([str(TRAIN)], way, model, out, *again) == [0] * WAYS[way][0], printed(out)
    for file in ("unet/diffusion_pytorch_model.safetensors", "delta.safetensors"):
        whole, resumed = load_file(uninterrupted(way) / file), load_file(out / file)
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items()), file
    left = {path.name for path in out.iterdir()} - {path.name for path in uninterrupted(way).iterdir()}
    assert not left - {"checkpoint-4", "checkpoint-6", "checkpoint-5"}, left
