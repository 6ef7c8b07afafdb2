"""bf16 weights of the fused engine get their digits back against what the training started from: the edited base.

A run of UCE and the meta term on MiniCanvas in bf16, put together and trained as by `fastunlearn train`.
`PYTHONPATH=.:kernels:tests/support python tests/engines/test_rounding.py` prints how far the unedited base as reference
misses the edit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_run import update_all
from torch import Tensor

from fastunlearn.config import load_config
from fastunlearn.engines.base import ExportedWeights
from fastunlearn.models.loading import load_pipeline
from fastunlearn.training.setup import prepare
from fastunlearn.utils.distributed import World

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    "--engine", "fused", "--mixed_precision", "bf16", "--max_train_steps", "1", "--surgery.enabled", "false",
    "--meta.num_images", "4", "--meta.batch_size", "2", "--meta.inner_batch_size", "2", "--meta.inner_steps", "1",
    "--retain.num_inference_steps", "2", "--report.report_to", "none",
]  # fmt: skip
TOO_SMALL = "1e-30"  # a rate at which no fp32 sum changes, let alone a bf16 weight


@dataclass(frozen=True)
class Trained:
    """What a run exports, and the model that it started from, before the edit."""

    exported: ExportedWeights
    base: Mapping[str, Tensor]


@cache
def trained(scope: str, learning_rate: str) -> Trained:
    arguments = [*OPTIONS, "--train.scope", scope, "--learning_rate", learning_rate]
    cfg = load_config(str(ROOT / "configs" / "minicanvas_uce_meta_object.toml"), arguments)
    run = prepare(cfg, World(0, 1, torch.device("cpu")))
    update_all(run)
    exported = run.export_weights()
    base = load_pipeline(cfg.model.pretrained_model_name_or_path, options=cfg.model).unet.state_dict()
    assert exported.edited and exported.trained
    return Trained(exported, base)


def old_restored(run: Trained) -> dict[str, Tensor]:
    """Against the unedited base, whatever had been edited."""
    everything = {**run.exported.edited, **run.exported.trained}
    return {name: run.base[name].float() + (w - run.base[name].bfloat16().float()) for name, w in everything.items()}


def error_of_the_edit(found: Mapping[str, Tensor], run: Trained) -> float:
    """|found - edited| / |edited - base| over all edited tensors."""
    edited = run.exported.edited
    missed = sum(float((found[name] - weight).double().square().sum()) for name, weight in edited.items())
    moved = sum(float((weight - run.base[name]).double().square().sum()) for name, weight in edited.items())
    return float((missed / moved) ** 0.5)


def test_an_edited_tensor_that_is_not_trained_comes_out_exact() -> None:
    run = trained("noxattn", "1e-4")
    assert run.exported.edited.keys().isdisjoint(run.exported.trained)
    found = run.exported.restored(run.base)
    assert all(torch.equal(found[name], weight) for name, weight in run.exported.edited.items())
    assert any(not torch.equal(found[name], run.base[name]) for name in run.exported.trained)
    assert error_of_the_edit(old_restored(run), run) > 1e-4


def test_an_edited_tensor_that_training_did_not_move_is_the_edited_original() -> None:
    run = trained("full", TOO_SMALL)
    assert run.exported.edited.keys() <= run.exported.trained.keys()
    found = run.exported.restored(run.base)
    assert all(torch.equal(found[name], weight) for name, weight in run.exported.edited.items())
    untouched = run.exported.trained.keys() - run.exported.edited.keys()
    assert untouched  # a weight of exactly zero takes even such a step
    assert all(float((found[name] - run.base[name]).abs().max()) < 1e-20 for name in untouched)
    assert error_of_the_edit(old_restored(run), run) > 1e-4


def test_what_training_changed_is_added_to_the_edited_original() -> None:
    base, edited = {"w": torch.tensor([1.001, -3.0003])}, {"w": torch.tensor([0.7007, -2.5001])}
    moved = torch.tensor([0.0, 0.25])
    weights = {"w": edited["w"].bfloat16().float() + moved}
    assert torch.equal(ExportedWeights(weights, edited, rounded=True).restored(base)["w"], edited["w"] + moved)


@pytest.mark.parametrize("rounded", [False, True])
def test_the_edit_is_exported_with_or_without_rounding(rounded: bool) -> None:
    base, edited = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.full((2,), 1.5)}
    found = ExportedWeights({"b": torch.full((2,), 2.0)}, edited, rounded=rounded).restored(base)
    assert found.keys() == {"a", "b"} and torch.equal(found["a"], edited["a"])


def main() -> None:
    """The figures."""
    for what, scope, rate in (("not trained", "noxattn", "1e-4"), ("not moved", "full", TOO_SMALL)):
        run = trained(scope, rate)
        new, old = (error_of_the_edit(found, run) for found in (run.exported.restored(run.base), old_restored(run)))
        print(f"edited, {what}: error {new:.3%} of the edit; against the unedited base {old:.3%}")


if __name__ == "__main__":
    main()
