"""Surgery on ZeRO shards gives the weights of one plain fp64 process with the same global batch, whatever the stage.

One launch trains all cases of `surgery_worker.py` on two ranks; two more train a few on one and on three ranks. The
reference below uses no DeepSpeed, no kernel and no shards: gradients of the whole batch in fp64, projected tensor by
tensor as the formula says, and torch's AdamW.
Stated tolerances, |w - reference| / |reference - start|: 1e-4 in fp32 (1e-3 where AdamW divides),
1e-2 with the retain gradient kept in bf16, 2e-2 in 8 bits, 0.1 with bf16 weights and activations.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from launched import WORKERS, run_ranks
from safetensors.torch import load_file
from surgery_case import CLIP, Case, cases, cases_for_other_worlds, config_of, the_pool, the_prompts, trained_names
from surgery_faults import FAULTS, SOUND, UPDATES, Fault
from surgery_mutations import MUTATIONS
from surgery_worker import mutated_case
from tiny import flat, tiny_backbone, tiny_rollout, tiny_unet
from torch import Tensor

from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.denoisers.teacher import Teacher
from fastunlearn.methods.tables import build_method
from fastunlearn.models.parameter_names import set_trainable
from fastunlearn.sampling.batch import BatchLayout
from fastunlearn.sampling.retain import PoolSource

WORKER = WORKERS / "surgery_worker.py"
CASES = cases()
WORLD = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    run_ranks(WORKER, folder, "cases", "faults", world=WORLD)
    return folder


def groups_of(names: list[str], granularity: str) -> dict[str, list[str]]:
    """Which tensors share a coefficient, written out by hand for the tiny U-Net."""
    if granularity == "tensor":
        return {name: [name] for name in names}
    if granularity == "global":
        return {"all": names}
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        groups.setdefault(".".join(parts[:3] if parts[0] == "mid_block" else parts[:4]), []).append(name)
    return groups


def projected(u: dict[str, Tensor], r: dict[str, Tensor], case: Case, v: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The textbook formula, or the variant that the case names, on whole gradients in fp64."""
    options = dict(case.extra)
    released = options.get("projection") == "released"
    strength = 0.0 if options.get("projection") == "none" else float(options.get("strength", 1.0))  # type: ignore[arg-type]
    rho = float(options.get("rho", 0.0))  # type: ignore[arg-type]
    out = dict(u)
    if released and case.clip:
        norm = math.sqrt(sum(float(g.square().sum()) for g in u.values()))
        out = {name: g * min(1.0, CLIP / norm) for name, g in u.items()}
    for members in groups_of(list(u), case.granularity).values():
        metric = {m: torch.ones_like(u[m]) if v is None else 1 / (v[m].sqrt() + case.step[0]) for m in members}
        dot = sum(float((out[m] * r[m] * metric[m]).sum()) for m in members)
        square = sum(float((r[m] * r[m] * metric[m]).sum()) for m in members)
        length = math.sqrt(sum(float(out[m].square().sum()) for m in members))
        wanted = dot if options.get("two_sided") else min(0.0, dot)
        coefficient = 0.0 if square == 0 else strength * wanted / square / (length if released else 1.0)
        for m in members:
            out[m] = out[m] - (coefficient - rho) * r[m]
    if case.clip and not released:
        norm = math.sqrt(sum(float(g.square().sum()) for g in out.values()))
        out = {name: g * min(1.0, CLIP / (norm + 1e-6)) for name, g in out.items()}
    return out


@cache
def reference(clip: bool, granularity: str, extra: tuple, half: str = "", batch: int = 4) -> tuple[Tensor, Tensor]:
    """Start and end of the run in one process, as flat vectors. ``half``: the network computes in bf16, from "sharded"
    bf16 copies of the fp64 weights, or under "autocast"; everything behind its gradient stays fp64."""
    case = Case(0, False, 1, False, clip, granularity, "auto", extra=extra, batch=batch)
    cfg, prompt_table = config_of(case, 1), the_prompts()
    backbone = tiny_backbone(prompt_table, autocast=half == "autocast")
    dtype = {"": torch.float64, "sharded": torch.bfloat16, "autocast": torch.float32}[half]
    unet = backbone.unet.to(dtype)
    backbone.embeds = backbone.embeds.to(torch.device("cpu"), dtype)
    names = trained_names(unet)
    set_trainable(unet, names)
    models = Predictors(backbone, unet, unet, Teacher(unet, names, whole_copy=True))
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    start = tiny_unet().state_dict()
    start = {name: start[name].double() for name in names}
    masters = {name: torch.nn.Parameter(start[name].clone()) for name in trained}
    optimizer = torch.optim.AdamW(masters.values(), lr=case.step[1], weight_decay=0.0, eps=case.step[0])
    layout = BatchLayout(0, 1, batch, 1)
    rollout = tiny_rollout(models, prompt_table, layout, steps=10)
    retain = PoolSource(cfg, models, prompt_table, layout, the_pool())
    method, mean = build_method(cfg), {name: torch.zeros_like(p) for name, p in masters.items()}
    decay = float(dict(extra).get("retain_ema", 0.0))
    for step in method.table():
        if step.restart:
            rollout.restart(step)
        (kept,) = retain.batches(step, rollout.timesteps[step.index])
        (student,) = models.train(kept.latents, kept.timesteps, kept.cond)
        assert kept.noise is not None
        r = gradients((student - kept.noise).square().mean(), trained)
        mean = {name: decay * mean[name] + (1 - decay) * r[name] for name in r}
        (window,) = rollout.batches(step, None)
        outcome = method.loss(models, window)
        assert outcome.loss is not None
        u = gradients(outcome.loss, trained)
        state = {name: optimizer.state[p].get("exp_avg_sq") for name, p in masters.items()}
        weighted = dict(extra).get("metric") == "optimizer" and step.update > 0
        final = projected(u, mean, case, state if weighted else None)
        for name, parameter in masters.items():
            parameter.grad = final[name]
        optimizer.step()
        for name, parameter in trained.items():
            parameter.data.copy_(masters[name].data)
        if step.continues and outcome.guided is not None:
            rollout.advance(step, [outcome.guided])
    return flat(start), flat(masters)


def gradients(loss: Tensor, trained: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(trained.values()))
    return {name: gradient.double() for name, gradient in zip(trained, found, strict=True)}


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
