"""Surgery on ZeRO shards gives the weights of one plain fp64 process with the same global batch, whatever the stage.

One launch trains all cases of `surgery_worker.py` on two ranks; two more train a few on one and on three ranks. The
reference below uses no DeepSpeed, no kernel and no shards: gradients of the whole batch in fp64, projected tensor by
tensor as the formula says, and torch's AdamW.
Stated tolerances, |w - reference| / |reference - start|: 1e-4 in fp32 (1e-3 where AdamW divides),
1e-2 with the retain gradient kept in bf16, 2e-2 in 8 bits, 0.1 with bf16 weights and activations.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launched import WORKERS, run_ranks
from safetensors.torch import load_file
from surgery_case import Case, cases, cases_for_other_worlds, trained_names
from surgery_faults import FAULTS, SOUND, UPDATES, Fault
from surgery_mutations import MUTATIONS
from surgery_reference import reference
from surgery_worker import mutated_case
from tiny import flat, tiny_unet
from torch import Tensor

WORKER = WORKERS / "surgery_worker.py"
CASES = cases()
WORLD = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    run_ranks(WORKER, folder, "cases", "faults", world=WORLD)
    return folder


def error_of(case: Case, folder: Path) -> float:
    half = "" if case.precision == "no" else "sharded" if case.stage else "autocast"
    start, expected = reference(case.clip, case.granularity, case.extra, half, case.batch)
    got = flat(load_file(folder / f"{case.name}.safetensors"))
    return float((got - expected).norm() / (expected - start).norm())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_equal_one_plain_process(case: Case, trained: Path) -> None:
    assert error_of(case, trained) <= case.tolerance


@pytest.mark.parametrize("case", [case for case in CASES if case.precision == "bf16"], ids=lambda case: case.name)
def test_with_bf16_the_masters_start_from_the_weights_as_they_were(case: Case, trained: Path) -> None:
    assert_starts_from_the_original(case, trained)


def assert_starts_from_the_original(case: Case, folder: Path) -> None:
    start, original = load_file(folder / f"{case.name}-start.safetensors"), tiny_unet().state_dict()
    assert start and all(torch.equal(tensor, original[name]) for name, tensor in start.items())


@pytest.fixture(scope="module", params=[1, 3], ids=["one rank", "three ranks"])
def elsewhere(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    run_ranks(WORKER, folder, "few", world=request.param)
    return folder


@pytest.mark.parametrize("case", cases_for_other_worlds(), ids=lambda case: case.name)
def test_one_and_three_ranks_equal_one_plain_process(case: Case, elsewhere: Path) -> None:
    assert error_of(case, elsewhere) <= case.tolerance
    assert_starts_from_the_original(case, elsewhere)


def test_three_ranks_have_uneven_parts() -> None:
    unet = tiny_unet().state_dict()
    sizes = [unet[name].numel() for name in trained_names(tiny_unet())]
    assert sum(sizes) % 3 and all(size % 3 for size in sizes)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(fault: Fault, trained: Path) -> None:
    ranks = [load_file(trained / f"{fault.name}-rank-{rank}.safetensors") for rank in range(WORLD)]
    assert all(torch.equal(tensor, ranks[1][name]) and tensor.isfinite().all() for name, tensor in ranks[0].items())
    reports = [json.loads((trained / f"{fault.name}-rank-{rank}.json").read_text()) for rank in range(WORLD)]
    assert reports[0] == reports[1] and reports[0]["skipped"] == UPDATES - 1
    assert "2 updates in a row" in reports[0]["message"]
    start, first, sound, last = (at(ranks[0], when) for when in ("start", "after 0", f"after {SOUND}", "after 3"))
    assert torch.equal(start, first) and not torch.equal(first, sound) and torch.equal(sound, last)
    # What the skipped window left behind would show in the update after it.
    plain = at(load_file(trained / f"{FAULTS[0].name}-rank-0.safetensors"), f"after {SOUND}")
    assert (sound - plain).norm() / (plain - start).norm() <= 1e-4


def at(weights: dict[str, Tensor], when: str) -> Tensor:
    return flat({name: tensor for name, tensor in weights.items() if name.startswith(f"{when}: ")})


def test_the_reference_moves_and_every_option_changes_it() -> None:
    start, plain = reference(True, "tensor", ())
    assert (plain - start).norm() > 1e-3
    others = [reference(False, "tensor", ()), reference(True, "global", ()), reference(True, "block", ())]
    changed = [case for case in CASES if case.extra and "retain_device" not in dict(case.extra)]
    others += [reference(case.clip, "tensor", case.extra) for case in changed]
    for _, other in others:
        assert (plain - other).norm() / (plain - start).norm() > 1e-3


def test_the_optimizers_metric_is_another_one() -> None:
    start, weighted = reference(False, "tensor", (("metric", "optimizer"),))
    _, plain = reference(False, "tensor", (("metric", "raw"),))
    assert (plain - weighted).norm() / (plain - start).norm() > 1e-2


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    run_ranks(WORKER, folder, "mutations", world=WORLD)
    return folder


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=lambda number: MUTATIONS[number].what)
def test_a_line_of_the_protocol_that_is_missing_shows(number: int, broken: Path) -> None:
    case = mutated_case(MUTATIONS[number].case)
    start, expected = reference(case.clip, case.granularity, (), "sharded" if case.precision == "bf16" else "")
    weights = broken / f"mutation-{number}.safetensors"
    if not weights.exists():
        return  # every rank ended in an error
    got = flat(load_file(weights))
    error = float((got - expected).norm() / (expected - start).norm())
    assert not error <= 10 * case.tolerance  # NaN shows it too
