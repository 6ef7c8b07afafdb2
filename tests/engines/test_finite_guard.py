"""The guard stands before every step, with or without surgery and a meta term: an update that is not finite is skipped
by all ranks alike and counted, and `surgery.max_skipped_updates` of them in a row end the run.

One launch each trains all ZeRO cases of `broken_updates.py` on one and on two ranks; the fused engine needs none.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_updates import BROKEN, FUSED_RUNS, LIMIT, ZERO_RUNS, BrokenRun, suffer_broken_updates
from launched import WORKERS, run_ranks
from surgery_worker import build_broken_run

from fastunlearn.errors import UserError
from fastunlearn.gradients.guard import FiniteGuard
from fastunlearn.utils.distributed import World

WORKER = WORKERS / "surgery_worker.py"


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def suffered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("broken")
    run_ranks(WORKER, folder, "broken", world=request.param)
    return folder, request.param


@pytest.mark.parametrize("case", ZERO_RUNS, ids=lambda case: case.name)
def test_zero_skips_it_on_all_ranks_and_leaves_everything_as_it_was(
    case: BrokenRun, suffered: tuple[Path, int]
) -> None:
    folder, world = suffered
    ranks = [json.loads((folder / f"{case.name}-rank-{rank}.json").read_text()) for rank in range(world)]
    for seen in ranks:
        assert_skipped(case, seen)
        assert [update["weights"] for update in seen] == [number not in BROKEN for number in range(len(seen))]
        assert [update["digest"] for update in seen] == [update["digest"] for update in ranks[0]]


@pytest.mark.parametrize("case", FUSED_RUNS, ids=lambda case: case.name)
def test_the_fused_engine_skips_it(case: BrokenRun) -> None:
    """A loss that is not finite leaves everything as it was; a gradient, its own layer and those that come after it in
    the backward pass: the others were stepped before anybody could know."""
    seen = suffer_broken_updates(case, build_broken_run(case, World(0, 1, torch.device("cpu"))))
    assert_skipped(case, seen)
    for number in BROKEN:
        ends_the_run = number == BROKEN[-1]  # its step remains counted; nothing follows
        assert ends_the_run or not seen[number]["tensor"]
        if case.what == "loss":
            assert not seen[number]["weights"] and (ends_the_run or not seen[number]["moments"])


@pytest.mark.parametrize(("finite", "refused"), [([True] * 3, False), ([False] * 3, True), ([True, False], False)])
def test_a_short_run_that_trained_nothing_is_refused(finite: list[bool], refused: bool) -> None:
    guard = FiniteGuard(limit=5)
    assert [guard.allows(torch.tensor(float(not sound))) for sound in finite] == finite
    with pytest.raises(UserError, match="nothing was exported") if refused else nullcontext():
        guard.check_end()


def assert_skipped(case: BrokenRun, seen: list[dict[str, Any]]) -> None:
    """What engines have in common: counts, the end of the run, the rate, the average, and sound updates."""
    assert [update["skipped"] for update in seen] == [0, 1, 1, 2, 3]
    assert [bool(update["message"]) for update in seen] == [False, False, False, False, True]
    assert f"{LIMIT} updates in a row" in seen[-1]["message"] and "\n" not in seen[-1]["message"]
    for number, update in enumerate(seen):
        stepped = number not in BROKEN
        assert update["rate"] is stepped
        assert update["average"] is (stepped and (case.method == "sdd" or case.stage < 3))  # kscu: where it is whole
        if stepped:
            assert update["weights"] and update["moments"]
        elif case.engine == "zero":
            assert not update["moments"]
