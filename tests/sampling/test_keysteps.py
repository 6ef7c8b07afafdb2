"""The key-step table: lengths, restarts and traversal sums of the published trainer, and its refusals."""

from __future__ import annotations

import pytest

from fastunlearn.config import Config
from fastunlearn.errors import UserError
from fastunlearn.methods.tables import rank_table
from fastunlearn.sampling.key_steps import KeyStep, key_step_table, scale_start, uniform_table

# (starts, updates) -> (restarts, sampler steps spent on restarts, free advances), counted on the released trainer.
PUBLISHED = [
    ([14], 750, (22, 328, 728)),  # nudity, class
    ([24], 500, (20, 496, 480)),  # style
    ([40], 200, (22, 900, 178)),  # one instance
    ([40, 40, 40], 750, (87, 3597, 663)),  # three instances
]


@pytest.mark.parametrize(("starts", "updates", "expected"), PUBLISHED)
def test_the_table_equals_the_published_one(starts: list[int], updates: int, expected: tuple[int, int, int]) -> None:
    table = key_step_table(starts, 50, updates)
    restarts = [step for step in table if step.restart]
    advances = sum(step.continues for step in table)
    assert len(table) == updates
    assert (len(restarts), sum(step.index for step in restarts), advances) == expected


def test_the_start_advances_every_loop_rounds_up_to_nine_tenths() -> None:
    starts = [step.index for step in key_step_table([43], 50, 400, loop=2) if step.restart]
    assert starts[:6] == [43, 43, 44, 44, 44, 44]
    assert max(starts) == 44


def test_each_round_visits_every_concept_at_its_own_start() -> None:
    table = key_step_table([17, 16], 20, 8)
    visits = [(0, 17), (0, 18), (0, 19), (1, 16), (1, 17), (1, 18), (1, 19), (0, 17)]
    assert [(step.concept, step.index) for step in table] == visits
    assert [step.continues for step in table] == [True, True, False, True, True, True, False, False]
    assert [step.update for step in table] == list(range(8))


@pytest.mark.parametrize(("starts", "updates"), [([45], 10), ([-1], 10), ([], 10), ([14], 0)])
def test_impossible_tables_are_refused(starts: list[int], updates: int) -> None:
    with pytest.raises(ValueError):
        key_step_table(starts, 50, updates)


def test_fractions_are_kept_at_other_step_counts() -> None:
    assert [scale_start(start, 25) for start in (14, 24, 40)] == [7, 12, 20]
    assert [scale_start(start, 100) for start in (14, 24, 40)] == [28, 48, 80]


def test_the_uniform_table_covers_the_schedule_and_repeats_with_its_seed() -> None:
    table = uniform_table(2, 50, 1000, seed=3)
    assert table == uniform_table(2, 50, 1000, seed=3)
    assert {step.index for step in table} == set(range(50))
    assert all(step.restart and not step.continues for step in table)
    assert [step.concept for step in table[:4]] == [0, 1, 0, 1]


CONCEPTS = ["neon style", "ink style", "cat", "popart style", "car"]


def spread(concepts: list[str], world: int, method: str = "kscu") -> list[list[KeyStep]]:
    train = {"spread_concepts": True, "max_train_steps": 160, "scope": "attn2"}
    named = [{"name": name, "anchor": "flat style" if "style" in name else "tree"} for name in concepts]
    doco = {"discriminator_warmup": 3}
    cfg = Config.model_validate({"concepts": named, "keep": ["fish"], "train": train, "method": method, "doco": doco})
    return [rank_table(cfg, rank, world) for rank in range(world)]


@pytest.mark.parametrize("method", ["kscu", "esd", "doco"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_spread_concepts_are_all_somebodys_and_nobody_waits(method: str, world: int) -> None:
    tables = spread(CONCEPTS, world, method)
    assert [len(table) for table in tables] == [160] * world
    owned = [{step.concept for step in table} for table in tables]
    assert owned == [set(range(rank, len(CONCEPTS), world)) for rank in range(world)]
    assert all([step.update for step in table] == list(range(160)) for table in tables)


def test_a_rank_walks_its_own_concepts_as_a_run_of_them_alone_would() -> None:
    alone = Config.model_validate({"concepts": ["ink style", "popart style"], "train": {"max_train_steps": 160}})
    expected = [(step.index, step.restart, step.continues, (1, 3)[step.concept]) for step in rank_table(alone, 0, 1)]
    assert [(s.index, s.restart, s.continues, s.concept) for s in spread(CONCEPTS[:4], 2)[1]] == expected


def test_ranks_beyond_the_concepts_share_them() -> None:
    assert [{step.concept for step in table} for table in spread(CONCEPTS[:2], 4)] == [{0}, {1}, {0}, {1}]


def test_without_it_all_ranks_have_one_table_and_at_stage_3_it_is_refused() -> None:
    cfg = Config.model_validate({"concepts": CONCEPTS[:2]})
    assert rank_table(cfg, 0, 2) == rank_table(cfg, 1, 2)
    with pytest.raises(UserError, match=r"^train\.spread_concepts:"):
        Config.model_validate({"concepts": CONCEPTS[:2], "train": {"spread_concepts": True}, "zero": {"stage": 3}})
