"""What a run says of itself: from what was measured, never from what was asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.evaluation.metrics.scores import unrecognised, wilson
from fastunlearn.export.changes import compare
from fastunlearn.export.outcome import finding, progress_outcome, title, verdict, why_it_ended
from fastunlearn.progress.reading import Reading
from fastunlearn.progress.stopping import Progress

BASE = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([[0.5, -0.5]])}


def moved(by: float) -> dict[str, Tensor]:
    return {name: tensor * (1 + by) for name, tensor in BASE.items()}


def test_nothing_moved() -> None:
    changes = compare(BASE, BASE, torch.float16)
    assert (changes.weights, changes.changed, changes.lost_to_rounding, changes.relative_change) == (6, 0, 0, 0.0)
    assert changes.lost_share == 0.0


def test_small_steps_round_back_in_half_precision_only() -> None:
    half, full = compare(moved(1e-5), BASE, torch.float16), compare(moved(1e-5), BASE, torch.float32)
    assert (half.changed, half.lost_to_rounding, half.lost_share) == (0, 6, 1.0)
    assert (full.changed, full.lost_to_rounding, full.dtype) == (6, 0, "fp32")
    assert full.relative_change == pytest.approx(1e-5, rel=1e-2)


def test_a_part_is_lost() -> None:
    result = moved(0.1)
    result["a"] = BASE["a"] + torch.tensor([0.5, 1e-5, 1e-5, 0.0])
    changes = compare({"a": result["a"]}, BASE, torch.float16)
    assert (changes.weights, changes.changed, changes.lost_to_rounding) == (4, 1, 2)


def test_a_base_in_half_precision_is_compared_as_it_is() -> None:
    base = {"a": torch.tensor([0.1, 0.2]).half()}
    assert compare({"a": base["a"].float()}, base, torch.float16).changed == 0
    assert compare({"a": torch.tensor([0.1, 0.2])}, base, torch.float32).changed == 2


def run(**fields: Any) -> Config:
    return Config.model_validate({"concepts": ["cat"], "output_dir": "out"} | fields)


def measured(before: float, after: float, count: int = 64) -> dict[str, Any]:
    def figures(ua: float) -> dict[str, Any]:
        return {"UA": ua, "counts": {"UA": count}, "intervals": {"UA": list(wilson(ua, count))}}

    return {
        "evaluation": {"before": figures(before), "after": figures(after)},
        "changes": {
            "weights": 1000, "changed": 900, "lost_to_rounding": 5, "relative_change": 0.01, "dtype": "fp16",
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (0.02, 1.0, "erased"),
        (0.02, 0.91, "erased"),
        (0.02, 0.6, "partly erased"),
        (0.02, 0.05, "not erased"),
        (0.1, 0.02, "not erased"),
    ],
)
def test_the_verdict_follows_the_figures(before: float, after: float, found: str) -> None:
    metrics = measured(before, after)
    assert verdict(metrics) == found
    said = finding(run(), metrics)
    assert said.startswith(f"{found.capitalize()}: cat is recognised in {1 - after:.0%} of 64 pictures")
    assert f"before: {1 - before:.0%}" in said and "900 of 1,000 weights" in said
    assert ("without cat" in title("base", run(), metrics)) == (found == "erased")


def test_a_run_that_changed_nothing_erased_nothing_whatever_the_figures_say() -> None:
    metrics = measured(0.0, 1.0)
    metrics["changes"] |= {"changed": 0, "lost_to_rounding": 0}
    assert finding(run(), metrics) == "Nothing was erased: no weight differs from the base model's."
    assert title("base", run(), metrics) == "base, unchanged"
    metrics["changes"] |= {"lost_to_rounding": 1000}
    assert "100% round back to the base model's in fp16" in finding(run(), metrics)


def test_what_was_not_measured_is_not_claimed() -> None:
    metrics = {"evaluation": None, "not_evaluated": "no classifier knows wombats"}
    assert finding(run(), metrics) == "Whether cat is gone was not measured: no classifier knows wombats."
    assert title("base", run(), metrics) == "base, edited to erase cat"


def test_a_share_that_rounding_takes_is_said() -> None:
    metrics = measured(0.0, 1.0)
    metrics["changes"] |= {"changed": 170, "lost_to_rounding": 830}
    assert '83% round back to the base model\'s in fp16; export.dtype "fp32" keeps them' in finding(run(), metrics)


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({"UA": 0.0, "IRA": 1.0, "CRA": 0.9}, None),
        ({"UA": 0.3, "IRA": 1.0, "CRA": 1.0}, "70%"),
        ({"UA": 0.0, "IRA": 0.65, "CRA": 1.0}, "65%"),
        ({"UA": 0.0, "IRA": 1.0, "CRA": 0.1}, "10%"),
        ({"UA": None, "IRA": None, "CRA": 0.9}, None),
        ({}, None),
    ],
)
def test_a_classifier_is_believed_where_it_sees_what_the_unedited_model_was_asked_for(
    figures: dict[str, float | None], reason: str | None
) -> None:
    said = unrecognised(figures)
    assert (said is None) == (reason is None)
    assert reason is None or reason in (said or "")


@pytest.mark.parametrize(("drift", "said"), [(0.25, "; drift of what is kept 0.25."), (math.nan, "500 updates.")])
def test_a_drift_that_no_probe_looked_at_is_not_said(drift: float, said: str) -> None:
    cfg = Config.model_validate({"concepts": ["neon style"]})
    progress = Progress(cfg.progress, stops=True, readings=[Reading(2, ((0.1,) * 4,), drift)])
    found = progress_outcome(cfg, progress, 2)
    text = why_it_ended(cfg, found)
    assert text.startswith("Not erased: 0% of 4 probes") and text.endswith(said) and "nan" not in text
