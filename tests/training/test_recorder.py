"""Losses that are not finite: updates skipped in between are logged; a run that ends so is an error."""

from __future__ import annotations

import errno
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastunlearn.config import Config
from fastunlearn.engines.base import Applied
from fastunlearn.errors import UserError
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.training import recorder
from fastunlearn.training.recorder import Recorder, Update
from fastunlearn.utils.distributed import single_process

NAN = math.nan


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "mean_over_ranks", lambda values: values)


def run(folder: Path, losses: list[float], every: int = 2) -> list[dict[str, object]]:
    """One update for each loss; one that is not finite is skipped, as the engine's guard does. Returns the log."""
    cfg = Config.model_validate(
        {
            "concepts": ["cat"], "output_dir": str(folder), "report": {"report_to": "none"},
            "train": {"logging_steps": every},
        }
    )  # fmt: skip
    record = Recorder(cfg, single_process(), len(losses), 0)
    for update, loss in enumerate(losses):
        stepped = math.isfinite(loss)
        step = KeyStep(update, 0, 1, True, False)
        norm = 1.0 if stepped else None
        record.record(step, 500, Update([torch.tensor(loss)], applied=Applied(stepped)), norm, 1e-4)
    record.close()
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def test_a_run_that_recovers_goes_on(tmp_path: Path) -> None:
    log = run(tmp_path, [0.1, NAN, NAN, 0.2, 0.1])
    assert [entry.get("skipped", False) for entry in log] == [False, True, True, False, False]


@pytest.mark.parametrize("every", [1, 2, 10])
def test_a_run_that_ends_without_a_finite_loss_is_an_error(tmp_path: Path, every: int) -> None:
    """Its weights give no picture, however short the run was: nothing may be exported."""
    with pytest.raises(UserError, match=r"^the loss is not finite at update 3: .*nothing was exported$"):
        run(tmp_path, [0.1, NAN, 0.1, NAN, NAN], every)
    assert len((tmp_path / "train_log.jsonl").read_text().splitlines()) == 5, "the log is written all the same"


def test_the_log_is_valid_json_where_a_loss_is_not_finite(tmp_path: Path) -> None:
    log = run(tmp_path, [0.1, NAN, math.inf, 0.1])
    assert "NaN" not in (tmp_path / "train_log.jsonl").read_text() and "Infinity" not in str(log)
    assert [entry["loss"] is None for entry in log] == [False, True, True, False]


def test_a_disk_that_takes_no_lines_for_a_while_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened, full = Path.open, [False, True, True, False]

    def open_or_not(path: Path, mode: str = "r", **options: Any) -> Any:
        if mode == "a" and full.pop(0):
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", open_or_not)
    log = run(tmp_path, [0.1, 0.2, 0.3, 0.4], every=1)
    assert [entry["update"] for entry in log] == [0, 1, 2, 3]
    assert capsys.readouterr().err.count("cannot be written (No space left on device); the run goes on") == 1


def test_without_tensorboard_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert recorder._open_curves(tmp_path, 0) is None
    said = capsys.readouterr().err
    assert said.startswith("warning: no TensorBoard curves: ") and said.count("\n") == 1


@pytest.mark.parametrize("damaged", [b"\xff\xfe", b'{"update": "x"}', b'{"update": null}', b"[1]", b"[" * 100_000])
def test_a_damaged_line_of_the_log_is_dropped_on_resume(tmp_path: Path, damaged: bytes) -> None:
    log = tmp_path / "train_log.jsonl"
    log.write_bytes(b'{"update": 0}\n' + damaged + b'\n{"update": 1}\n{"update": 2}\n')
    recorder._truncate_log(log, 2)
    assert log.read_text() == '{"update": 0}\n{"update": 1}\n'
