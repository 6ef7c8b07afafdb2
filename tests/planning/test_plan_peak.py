"""The planner's total against the measured peak of whole updates, on the embedded model and a CPU: within 10 %."""

from __future__ import annotations

import json

import pytest
from launched import WORKERS, run_ranks
from peak_worker import CASES, config

from fastunlearn.models.description import describe_model
from fastunlearn.planning.plan import make_plan


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    folder = tmp_path_factory.mktemp("peaks")
    run_ranks(WORKERS / "peak_worker.py", folder, world=1)
    return json.loads((folder / "peaks.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_within_a_tenth_of_the_peak(case: str, measured: dict[str, int]) -> None:
    cfg = config(case)
    plan = make_plan(cfg, 1, describe_model(cfg))
    planned = max(device + host for device, host in plan.phases.values())  # on a CPU both are the same memory
    assert planned == pytest.approx(measured[case], rel=0.1), (planned, measured[case])
