"""Losses that are not finite: updates skipped in between are logged; a run that ends so is an error."""

from __future__ import annotations

import json
import math
from pathlib import Path

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
