"""The updates that are made of a table, where concepts are done."""

from __future__ import annotations

from itertools import pairwise

from fastunlearn.sampling.key_steps import KeyStep, KeySteps, key_step_table, uniform_table

NOTHING: frozenset[int] = frozenset()


def made(steps: KeySteps, done: frozenset[int] = NOTHING, count: int = 10**6, start: int = 0) -> list[KeyStep]:
    found: list[KeyStep] = []
    while len(found) < count and (step := steps.take(start + len(found), done)) is not None:
        found.append(step)
    return found


def test_with_nothing_done_it_is_the_table() -> None:
    for table in (key_step_table([4, 6], 10, 40), uniform_table(2, 10, 20, seed=1)):
        assert made(KeySteps(table)) == table


def test_a_done_concept_is_left_out_and_the_rest_is_linked_anew() -> None:
    steps = KeySteps(key_step_table([4, 6], 10, 40))
    first = made(steps, count=7)
    rest = made(steps, frozenset({0}), start=7)
    assert {step.concept for step in rest} == {1} and [step.update for step in rest] == list(range(7, 7 + len(rest)))
    follows = [*first, *rest]
    for before, after in pairwise(follows):
        assert after.restart != (
            after.concept == before.concept and after.index == before.index + 1 and before.continues
        )


def test_a_concept_that_comes_back_starts_a_fresh_trajectory() -> None:
    steps = KeySteps(key_step_table([4, 4], 8, 64))
    made(steps, count=2)
    left_out = made(steps, frozenset({0}), count=4, start=2)
    assert [step.concept for step in left_out] == [1] * 4 and left_out[0].restart
    assert made(steps, count=1, start=6)[0].restart


def test_it_ends_when_no_other_concept_has_an_update_left() -> None:
    steps = KeySteps(key_step_table([0, 0], 4, 8))
    made(steps, count=4)
    assert not steps.ends(NOTHING) and steps.ends(frozenset({1})) and steps.take(4, frozenset({1})) is None


def test_its_state_comes_back() -> None:
    table = key_step_table([2, 3], 8, 40)
    steps, again = KeySteps(table), KeySteps(table)
    made(steps, count=5)
    made(steps, frozenset({1}), count=3, start=5)
    again.load_state_dict(steps.state_dict())
    assert made(again, start=8) == made(steps, start=8)
