"""When a run is probed, which concepts are done, when it ends, and which weights remain."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from fastunlearn.progress.reading import Reading, quantile
from fastunlearn.progress.stopping import Progress, next_probe, probes_of
from fastunlearn.schema.sections import ProgressConfig
from fastunlearn.utils.text import json_text

GONE, HALF, THERE = (1.0,) * 8, (1.0,) * 4 + (0.1,) * 4, (0.0,) * 8


def progress(stops: bool = True, start: int = 0, **settings: object) -> Progress:
    return Progress(ProgressConfig.model_validate({"in_a_row": 2} | settings), stops, start=start)


def test_probes_come_geometrically_and_after_the_last_update() -> None:
    assert list(probes_of(100, "auto")) == [2, 4, 8, 16, 32, 48, 64, 96, 100]
    assert list(probes_of(400, "auto"))[-5:] == [224, 256, 320, 384, 400]
    assert list(probes_of(10, 4)) == [4, 8, 10]
    assert list(probes_of(1, "auto")) == [1]
    assert list(probes_of(0, "auto")) == []
    found = list(probes_of(10_000, "auto"))
    assert all(1.1 < after / before <= 2.0 for before, after in pairwise(found))
    assert [next_probe(n, "auto") for n in (0, 1, 2, 31, 32, 47, 48)] == [2, 2, 4, 32, 48, 48, 64]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_the_quantile_is_numpys(share: float) -> None:
    values = [0.3, -1.0, 2.0, 0.7, 0.7]
    assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)))
    assert math.isnan(quantile([], share))


def test_a_reading_comes_back_from_json_as_it_was() -> None:
    for reading in (Reading(3, (GONE, ()), math.nan), Reading(8, (HALF,), 0.4, (0.25,))):
        again = Reading.from_json(json.loads(json_text(reading.as_json())))
        assert (again.update, again.moved, again.recognised) == (reading.update, reading.moved, reading.recognised)
        assert again.drift == reading.drift or (math.isnan(again.drift) and math.isnan(reading.drift))


def test_it_ends_after_two_probes_in_a_row() -> None:
    run = progress()
    run.add(Reading(16, (HALF,), 0.2))
    assert run.ended is None and run.due == 32
    run.add(Reading(32, (GONE,), 0.3))
    assert run.ended is None and run.due == 48
    run.add(Reading(48, (HALF,), 0.3))
    assert run.ended is None and run.due == 64
    run.add(Reading(64, (GONE,), 0.3))
    run.add(Reading(96, (GONE,), 0.4))
    assert run.ended == "erased" and run.best is run.readings[-1]


@pytest.mark.parametrize(
    ("moved", "holds"),
    [
        (GONE, True),
        ((0.96,) * 8, True),
        ((0.94,) * 8, False),
        ((1.0,) * 7 + (0.1,), True),  # one of eight is 12 %
        ((1.0,) * 6 + (0.1,) * 2, False),
        ((1.0,) * 15 + (0.94,) * 5, False),  # enough have gone, and the slowest not far enough
        ((2.0,) * 8 + (0.1,) * 2, False),
        ((), False),
    ],
)
def test_what_was_asked_for_is_a_share_and_a_low_quantile(moved: tuple[float, ...], holds: bool) -> None:
    assert progress().all_hold(Reading(2, (moved,), 0.0)) == holds


def test_of_several_concepts_the_done_ones_are_left_out_until_they_come_back() -> None:
    run = progress()
    for update, first, second in [(2, GONE, THERE), (4, GONE, THERE)]:
        run.add(Reading(update, (first, second), 0.1))
    assert run.done == {0} and run.ended is None
    run.add(Reading(8, (HALF, GONE), 0.1))
    assert run.done == frozenset()
    run.add(Reading(16, (GONE, GONE), 0.1))
    assert run.done == {1}
    run.add(Reading(18, (GONE, GONE), 0.1))
    assert run.done == {0, 1} and run.ended == "erased"


def test_the_weights_that_remain_are_erased_first_and_then_those_that_keep_most() -> None:
    run = progress(in_a_row=1)
    assert run.add(Reading(2, (THERE,), 0.0))
    assert run.add(Reading(4, (HALF,), 0.6))  # nearer to what was asked for, whatever it costs
    assert not run.add(Reading(8, (THERE,), 0.1))
    assert run.add(Reading(16, (GONE,), 0.9))
    assert not run.add(Reading(18, (GONE,), 0.95))
    assert run.add(Reading(20, (GONE,), 0.5))
    assert run.best is not None and run.best.update == 20


def test_it_ends_where_what_is_kept_changes_too_much_and_keeps_what_did_not() -> None:
    run = progress(max_drift=0.5)
    run.add(Reading(2, (THERE,), 0.1))
    run.add(Reading(4, (HALF,), 0.4))
    assert run.ended is None
    run.add(Reading(8, (GONE,), 0.7))
    assert run.ended == "drift" and run.best is run.readings[1]


def test_a_run_that_only_watches_goes_on() -> None:
    run = progress(stops=False, max_drift=0.1)
    for update in (2, 4, 8):
        run.add(Reading(update, (GONE,), 0.7))
    assert run.ended is None and run.done == frozenset() and run.due == 16


def test_a_classifier_that_still_sees_it_is_believed() -> None:
    run = progress()
    assert not run.all_hold(Reading(2, (GONE,), 0.0, recognised=(0.25,)))
    assert run.all_hold(Reading(2, (GONE,), 0.0, recognised=(0.0,)))


def test_updates_before_the_model_changes_do_not_count() -> None:
    run = progress(start=100)
    assert run.due == 102
    run.add(Reading(102, (THERE,), 0.0))
    assert run.due == 104


def test_its_state_comes_back() -> None:
    run, again = progress(), progress()
    for update, moved in [(2, HALF), (4, GONE)]:
        run.add(Reading(update, (moved,), 0.2))
    again.load_state_dict(json.loads(json_text(run.state_dict())))
    assert (again.readings, again.due, again.best) == (run.readings, run.due, run.best)
