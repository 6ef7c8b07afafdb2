"""The meta term: held to a plain fp64 version on two ranks and under the fused engine, and the exact gradient to finite
differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import WORKERS, run_ranks
from meta_case import ASCENT, CASES, Case, build_run, config_of, error, reference, samples, weighted
from PIL import Image
from safetensors.torch import load_file
from tiny import flat
from tiny_run import update_all

from fastunlearn.config import load_config
from fastunlearn.config.run_prompts import meta_prompts, set_captions
from fastunlearn.engines.fused.engine import FusedEngine
from fastunlearn.errors import UserError
from fastunlearn.meta.image_sets import QueryBatch
from fastunlearn.meta.inner_loop import all_trainable
from fastunlearn.meta.memory import attack_rows, pool_sizes
from fastunlearn.meta.second_order import attacked_prediction
from fastunlearn.planning.unet_calls import count_evaluations, pools
from fastunlearn.sampling.retain import RetainBatch
from fastunlearn.schema.meta import MetaConfig, meta_weights
from fastunlearn.training.setup import Run
from fastunlearn.utils.distributed import World
from fastunlearn.utils.memory_rows import Sizes

WORLD = World(0, 1, torch.device("cpu"))
FUSED = Case("fused", engine="fused", meta=ASCENT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meta")
    run_ranks(WORKERS / "meta_worker.py", folder, world=2)
    return folder


def distance(weights: dict[str, torch.Tensor], case: Case) -> float:
    start, expected = reference(case)
    return float((flat(weights) - expected).norm() / (expected - start).norm())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_equal_a_plain_copy_and_attack(case: Case, trained: Path) -> None:
    assert distance(load_file(trained / f"{case.name}.safetensors"), case) <= case.tolerance


@pytest.mark.parametrize("weights", [{}, {"related_weight": 0.0, "unrelated_weight": 0.0}], ids=["", "forbidden"])
@pytest.mark.parametrize("method", ["kscu", "uce"])
@pytest.mark.parametrize("surgery", [False, True])
def test_the_fused_engine_does_the_same(surgery: bool, method: str, weights: dict[str, float]) -> None:
    case = replace(FUSED, surgery=surgery, method=method, rho=1.5, meta=(*ASCENT, *weights.items()))
    run = build_run(case, WORLD)
    update_all(run)
    assert distance(run.engine.export_weights().trained, case) <= case.tolerance


def test_a_term_that_waits_in_8_bits_stays_within_its_bound() -> None:
    case = replace(FUSED, meta=(*ASCENT, ("gradient_dtype", "int8")))
    run = build_run(case, WORLD)
    update_all(run)
    assert 1e-5 < distance(run.engine.export_weights().trained, case) <= 2e-2


def test_every_part_of_the_term_shows_in_the_reference() -> None:
    _, plain = reference(CASES[0])
    start, _ = reference(CASES[0])
    for changes in ({"forbidden_weight": 0.0}, {"related_weight": 0.0}, {"unrelated_weight": 0.0}, {"inner_steps": 1}):
        _, other = reference(replace(CASES[0], meta=(*ASCENT, *changes.items())))
        assert (plain - other).norm() / (plain - start).norm() > 1e-3, changes


def fused_run(**meta: Any) -> Run:
    return build_run(replace(FUSED, meta=(*ASCENT, *meta.items())), WORLD)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("scope", ["full", "trained"])
def test_the_attack_changes_its_scope_and_leaves_no_trace(optimizer: str, scope: str) -> None:
    run = fused_run(inner_optimizer=optimizer, inner_scope=scope)
    assert run.meta is not None
    unet, attack = run.engine.sampler, run.meta.attack
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    trainable = [p.requires_grad for p in unet.parameters()]
    with attack.applied(run.meta.sets.attack_batches(run.table[0]), seed=0):
        changed = {name for name, p in unet.named_parameters() if not torch.equal(p, before[name])}
        assert [p.requires_grad for p in unet.parameters()] == trainable
    expected = set(before) if scope == "full" else set(run.engine.named)
    assert changed <= expected and len(changed) > 0.8 * len(expected)  # a bias that has no part keeps its value
    for name, parameter in unet.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_an_attack_with_adapters_leaves_the_weights_and_changes_the_predictions() -> None:
    run = fused_run(inner_scope="lora", inner_optimizer="adamw", inner_learning_rate=1e-2)
    assert run.meta is not None
    batch, before = (
        run.meta.sets.query_batch(run.table[0], 500).batch,
        flat(dict(run.engine.sampler.named_parameters())),
    )

    def predicted() -> torch.Tensor:
        with torch.no_grad():
            return run.models.attacked(run.engine.sampler, batch.latents, batch.timesteps, batch.cond)

    plain = predicted()
    with run.meta.attack.applied(run.meta.sets.attack_batches(run.table[0]), seed=0):
        assert not torch.equal(predicted(), plain)
        assert torch.equal(flat(dict(run.engine.sampler.named_parameters())), before)
    assert torch.equal(predicted(), plain)


def test_an_attack_that_fails_leaves_no_trace_either() -> None:
    run = fused_run()
    assert run.meta is not None
    before = flat(dict(run.engine.sampler.named_parameters()))
    with pytest.raises(KeyError), run.meta.attack.applied(run.meta.sets.attack_batches(run.table[0]), seed=0):
        raise KeyError
    assert torch.equal(flat(dict(run.engine.sampler.named_parameters())), before)


def test_with_all_weights_zero_it_is_the_method_alone_bit_for_bit() -> None:
    zero = (("forbidden_weight", 0.0), ("related_weight", 0.0), ("unrelated_weight", 0.0))
    runs = [build_run(replace(FUSED, meta=(*ASCENT, *extra)), WORLD) for extra in (zero, (("enabled", False),))]
    for run in runs:
        update_all(run)
    assert runs[0].meta is None
    assert torch.equal(*(flat(run.engine.export_weights().trained) for run in runs))


def test_weights_that_only_the_attack_sees_add_nothing_at_rate_zero() -> None:
    """Tied coefficients cancel where the attack does nothing."""
    run = fused_run(forbidden_weight=0.0, inner_learning_rate=1e-30)
    plain = build_run(replace(FUSED, meta=(("enabled", False),)), WORLD)
    for each in (run, plain):
        update_all(each)
    assert run.meta is not None
    assert torch.equal(flat(run.engine.export_weights().trained), flat(plain.engine.export_weights().trained))


def test_pictures_are_the_same_on_any_number_of_ranks() -> None:
    run = fused_run()
    assert run.meta is not None
    whole = run.meta.sets.query_batch(run.table[0], 500)
    parts = []
    for rank in range(2):
        half = build_run(FUSED, WORLD)
        cfg = config_of(FUSED, 2)
        assert half.meta is not None
        sets = type(half.meta.sets)(
            cfg, half.models, half.meta.sets.prompt_table, World(rank, 2, WORLD.device), run.meta.sets.pools
        )
        parts.append(sets.query_batch(run.table[0], 500))
    for number in range(3):
        together = torch.cat([samples(part, number).latents for part in parts])
        assert torch.equal(together, samples(whole, number).latents)


def test_the_judged_forbidden_pictures_are_not_the_attackers() -> None:
    run = fused_run()
    assert run.meta is not None
    attacked, queried = run.meta.sets._forbidden(run.table[0])
    assert attacked and queried and not set(attacked) & set(queried)


def test_second_order_equals_finite_differences() -> None:
    """d/dw of the losses after two steps of SGD, in fp64, along random directions of all weights."""
    run = fused_run(inner_steps=2, inner_learning_rate=0.5)
    assert run.meta is not None
    unet, meta = run.engine.sampler.double(), run.meta
    run.models.backbone.embeds = run.models.backbone.embeds.to(WORLD.device, torch.float64)
    query, batches = meta.sets.query_batch(run.table[0], 500), meta.sets.attack_batches(run.table[0])
    weights = meta_weights(run.cfg.meta)

    def loss_after() -> torch.Tensor:
        prediction = attacked_prediction(meta.attack, batches, query.batch)
        return weighted(weights[2:], means(prediction, query))

    parameters = list(unet.parameters())
    with all_trainable(parameters):
        found = torch.autograd.grad(loss_after(), parameters, allow_unused=True)
        draw = torch.Generator().manual_seed(5)
        directions = [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in parameters]
        sides = []
        for sign in (1.0, -2.0):
            for p, d in zip(parameters, directions, strict=True):
                p.data.add_(d, alpha=sign * 1e-6)
            sides.append(float(loss_after().detach()))
    slope = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True) if g is not None)
    first = sum(float((g * d).sum()) for g, d in zip(first_order(run), directions, strict=True))
    assert slope == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4)
    assert abs(first / slope - 1) > 1e-3  # the first-order rule is another one


def means(prediction: torch.Tensor, query: QueryBatch) -> list[torch.Tensor]:
    """The noise loss of each set."""
    assert query.batch.noise is not None
    squares = (prediction - query.batch.noise).square()
    return [squares[query.set_B == number].mean() for number in range(3)]


def first_order(run: Run) -> list[torch.Tensor]:
    """The gradient at the attacked weights."""
    assert run.meta is not None
    meta, unet, weights = run.meta, run.engine.sampler, meta_weights(run.cfg.meta)
    query = meta.sets.query_batch(run.table[0], 500)
    with all_trainable(list(unet.parameters())), meta.attack.applied(meta.sets.attack_batches(run.table[0]), seed=0):
        losses = [error(run.models, unet, samples(query, number)) for number in range(3)]
        found = torch.autograd.grad(weighted(weights[2:], losses), list(unet.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, unet.parameters(), strict=True)]


def test_second_order_reaches_the_engine() -> None:
    """The gradient that the engine is handed is the exact one."""
    run = build_run(replace(FUSED, meta=(*ASCENT, ("order", "second"), ("inner_learning_rate", 0.5))), WORLD)
    assert run.meta is not None
    run.meta.capture(run.table[0], 500)
    kept = {name: torch.zeros(0) for name in run.engine.named}
    assert isinstance(run.engine, FusedEngine)
    for layer in run.engine._layers:
        for parameter, tensor in zip(layer.parameters, layer.meta._dequantized(torch.float32), strict=True):
            kept[next(name for name, p in run.engine.named.items() if p is parameter)] = tensor.view(parameter.shape)
    query, batches = run.meta.sets.query_batch(run.table[0], 500), run.meta.sets.attack_batches(run.table[0])
    weights, named = meta_weights(run.cfg.meta), run.engine.named
    with all_trainable(list(run.engine.sampler.parameters())):
        prediction = attacked_prediction(run.meta.attack, batches, query.batch)
        after = torch.autograd.grad(weighted(weights[2:], means(prediction, query)), list(named.values()))
    here = [error(run.models, run.engine.sampler, samples(query, number)) for number in (1, 2)]
    before = torch.autograd.grad(weighted(weights[:2], here), list(named.values()))
    expected = flat({name: a + b for name, a, b in zip(named, after, before, strict=True)})
    assert float((flat(kept) - expected).norm() / expected.norm()) < 1e-4


BAD = [
    ({"zero.stage": 3}, "zero.stage"),
    ({"meta.num_images": 6}, "meta.num_images"),
    ({"meta.inner_steps": 0}, "meta.inner_steps"),
    ({"meta.every": 0}, "meta.every"),
    ({"meta.inner_optimizer": "sgd", "model.mixed_precision": "bf16"}, "meta.inner_optimizer"),
    ({"meta.order": "second"}, "meta.order"),
    ({"meta.order": "second", "meta.inner_optimizer": "sgd"}, "model.attention"),
    ({"engine": "fused", "train.max_grad_norm": 1.0}, "train.max_grad_norm"),
    ({"meta.forbidden_prompts": "tree"}, "meta.forbidden_prompts"),
    ({"meta.related_prompts": "a kitty"}, "meta.related_prompts"),
    ({"meta.forbidden_loss": "erased", "teacher.storage": "cached"}, "meta.forbidden_loss"),
    ({"meta.related_weight": -1.0}, "meta.related_weight"),
    ({"meta.restart_every": 2, "meta.inner_scope": "lora"}, "meta.restart_every"),
    ({"method": "uce", "meta.every": 2}, "meta.every"),
    ({"method": "rece", "meta.timesteps": "key"}, "meta.timesteps"),
    ({"method": "uce", "teacher.storage": "cached"}, "teacher.storage"),
    ({"method": "uce", "surgery.enabled": "true", "retain.timesteps": "key"}, "retain.timesteps"),
    ({"method": "uce", "surgery.enabled": "true", "retain.source": "prompts"}, "retain.source"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "field"), BAD, ids=lambda value: value if isinstance(value, str) else None)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], field: str) -> None:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with pytest.raises(UserError, match=field) as caught:
        load_config(None, ["--concepts", "cat", "--meta.enabled", "true", *words])
    assert "\n" not in str(caught.value)


def test_a_set_without_a_weight_needs_no_prompts() -> None:
    """On a model whose concepts are not known there is nothing to take the kept sets from."""
    words = ["--concepts", "cat", "--pretrained_model_name_or_path", "somebody/model", "--meta.enabled", "true"]
    with pytest.raises(UserError, match=r"meta\.related_prompts"):
        load_config(None, words)
    load_config(None, [*words, "--meta.related_weight", "0", "--meta.unrelated_weight", "0"])


def test_the_released_coefficients_are_those_of_the_script() -> None:
    cfg = load_config(None, ["--concepts", "cat", "--meta.enabled", "true", "--meta.coefficients", "released"])
    expected = (0.03, 0.3, -0.03, -3.0, -3.0)  # three batches each
    assert tuple(meta_weights(cfg.meta)) == pytest.approx(expected)
    tied = meta_weights(load_config(None, ["--concepts", "cat", "--meta.enabled", "true"]).meta)
    assert tied.before_related == -tied.after_related and tied.before_unrelated == -tied.after_unrelated


@pytest.mark.parametrize(
    ("given", "terms", "ascends"),
    [
        ({}, 20, False),
        ({"inner_scope": "lora"}, 1, False),
        ({"order": "second"}, 1, False),
        ({"restart_every": 3}, 3, False),
        ({"coefficients": "released"}, 20, True),
        ({"forbidden_loss": "ascent"}, 20, True),
    ],
)
def test_what_follows_from_what_is_given(given: dict[str, Any], terms: int, ascends: bool) -> None:
    meta = MetaConfig.model_validate(given)
    assert (meta.steps_per_attack, meta.ascends) == (terms, ascends)
    assert (meta_weights(meta).after_forbidden < 0) == ascends


def test_folders_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    for number in range(8):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a cat" if number == 7 else "a thing")
    words = ["--concepts", "cat", "--meta.enabled", "true"]
    cfg = load_config(None, [*words, "--meta.forbidden_folder", str(tmp_path)])
    assert len(set_captions(cfg)["forbidden"]) == 8 and "forbidden" not in meta_prompts(cfg)
    with pytest.raises(UserError, match=r"related_folder: 7\.png"):
        set_captions(load_config(None, [*words, "--meta.related_folder", str(tmp_path)]))
    with pytest.raises(UserError, match="8 images; at least 10"):
        set_captions(load_config(None, [*words, "--meta.forbidden_folder", str(tmp_path), "--meta.batch_size", "5"]))


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"forbidden_loss": "erased", "every": 2},
        {"related_weight": 0.0},
        {"forbidden_loss": "erased", "negative_guidance": 1.0},
    ],
)
def test_the_planner_counts_what_a_run_evaluates(meta: dict[str, Any]) -> None:
    run = fused_run(**meta)
    update_all(run)
    counted_as_planned(run)


def test_the_planner_counts_the_updates_after_an_edit() -> None:
    run = build_run(replace(FUSED, method="uce", surgery=True, rho=1.0, meta=ASCENT), WORLD)
    update_all(run)
    counted_as_planned(run)


def counted_as_planned(run: Run) -> None:
    pictures = 2 * (pools(run.cfg) * run.cfg.retain.num_images + pool_sizes(run.cfg)[0])
    pictures *= run.cfg.retain.num_inference_steps
    unwatched = run.cfg.progress.model_copy(update={"enabled": False})
    planned = count_evaluations(run.cfg.model_copy(update={"progress": unwatched}), 1)
    assert replace(planned, teacher=planned.teacher - pictures) == run.models.evaluations  # the test's are not drawn


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_planner_knows_what_an_attacker_who_goes_on_keeps(optimizer: str) -> None:
    run = fused_run(restart_every=2, inner_optimizer=optimizer)
    assert run.meta is not None
    attack, sizes = run.meta.attack, tuple(p.numel() for p in run.engine.sampler.parameters())
    with attack.applied(run.meta.sets.attack_batches(run.table[0]), seed=0):
        pass
    state = attack.state_dict()
    held = [value for slot in state["optimizer"]["state"].values() for value in slot.values() if value.ndim]
    rows = {row.name: row for row in attack_rows(run.cfg, Sizes(((32, sizes),), ()))}
    assert sum(tensor.nbytes for tensor in state["gone"]) == rows["meta: how far it came"].device
    assert sum(tensor.nbytes for tensor in held) == rows["meta: the attacker's moments"].device
    with attack.applied(run.meta.sets.attack_batches(run.table[1]), seed=0):
        pass
    assert attack.state_dict() == {"terms": 2}


def test_unused_batches_are_not_made() -> None:
    """A batch that a set of weight 0 would need is not drawn."""
    run = fused_run()
    assert run.meta is not None
    sets = run.meta.sets
    sets.pools = {name: pool for name, pool in sets.pools.items() if name != "unrelated"}
    assert sorted(set(sets.query_batch(run.table[0], 500).set_B.tolist())) == [0, 1]
    assert isinstance(sets.query_batch(run.table[0], 500).batch, RetainBatch)
