"""The relearning test's pure parts: two numbers of a curve, options, prompts. No torch is needed for any of it."""

from __future__ import annotations

import pytest

from fastunlearn.config import Config
from fastunlearn.errors import UserError
from fastunlearn.evaluation.attacks.settings import parse_seeds, parse_steps
from fastunlearn.evaluation.classifiers.minicanvas_grid import build_grid, known_concepts
from fastunlearn.evaluation.pictures.grid import Erased
from fastunlearn.evaluation.relearning import Settings
from fastunlearn.evaluation.relearning.curve import area, steps_to_half, summary, summary_at
from fastunlearn.evaluation.relearning.prompts import BENIGN, GROUPS, forbidden_prompts, other_prompts

OBJECTS = ("apple", "car", "cat", "fish", "house", "tree", "butterfly", "sunflower", "mushroom", "sailboat")
STYLES = ("flat", "ink", "neon", "blueprint", "sepia", "popart", "pixel", "watercolor")

# --- curves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "recognised", "original", "expected"),
    [
        ((0, 10, 50), (0.0, 0.5, 0.9), 1.0, 10.0),  # exactly at a measured point
        ((0, 10, 50), (0.1, 0.4, 0.8), 1.0, 20.0),  # a quarter of the way from 10 to 50
        ((0, 10, 50), (0.1, 0.4, 0.8), 0.4, 10 / 3),  # half of the original's share, not one half
        ((0, 10, 50), (0.6, 0.2, 0.1), 1.0, 0.0),  # never gone
        ((0, 10, 50), (0.0, 0.2, 0.49), 1.0, None),
        ((0, 10, 50, 90), (0.0, 0.6, 0.2, 0.7), 1.0, 25 / 3),  # the first crossing counts
        ((0, 10), (0.0, 0.3), 0.0, None),  # the original does not show it either: nothing can come back
    ],
)
def test_steps_to_half(
    steps: tuple[int, ...], recognised: tuple[float, ...], original: float, expected: float | None
) -> None:
    assert steps_to_half(steps, recognised, original) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("steps", "recognised", "expected"),
    [
        ((0, 100), (0.4, 0.4), 0.4),
        ((0, 100), (0.0, 1.0), 0.5),
        ((0, 10, 100), (0.0, 1.0, 1.0), 0.95),  # a triangle of 5 and a rectangle of 90, of 100
        ((0, 10, 50), (0.2, 0.6, 0.4), (4 + 20) / 50),
        ((0,), (0.3,), 0.3),
    ],
)
def test_area_is_the_mean_height(steps: tuple[int, ...], recognised: tuple[float, ...], expected: float) -> None:
    assert area(steps, recognised) == pytest.approx(expected)


def test_a_curve_needs_a_value_for_each_of_increasing_steps() -> None:
    for steps, values in (((0, 10), (0.1,)), ((10, 0), (0.1, 0.2)), ((), ())):
        with pytest.raises(ValueError, match="increasing steps"):
            area(steps, values)
        with pytest.raises(ValueError, match="increasing steps"):
            steps_to_half(steps, values, 1.0)


def test_summary_over_seeds() -> None:
    found = summary([1.0, 2.0, 6.0])
    assert found == {"mean": 3.0, "spread": pytest.approx(7**0.5), "reached": 3, "seeds": 3}
    # A mean of those that got there would be too low.
    assert summary([10.0, None]) == {"mean": None, "spread": None, "reached": 1, "seeds": 2}
    assert summary([None]) == {"mean": None, "spread": None, "reached": 0, "seeds": 1}
    assert summary([4.0]) == {"mean": 4.0, "spread": None, "reached": 1, "seeds": 1}


def test_summary_at_each_step() -> None:
    assert summary_at([(0.0, 0.2), (0.0, 0.6)]) == {
        "mean": [0.0, pytest.approx(0.4)],
        "spread": [0.0, pytest.approx(0.08**0.5)],
    }
    assert summary_at([(0.0, 0.2)])["spread"] == [None, None]


# --- options ---------------------------------------------------------------------------------------------------------


def test_steps_and_seeds_are_read() -> None:
    assert parse_steps("0,10, 50") == (0, 10, 50)
    assert parse_steps("25") == (0, 25)
    assert parse_seeds("3") == (0, 1, 2)
    assert parse_seeds("4,7") == (4, 7)
    assert parse_seeds("4,") == (4,)


@pytest.mark.parametrize("text", ["10,5", "5,5", "-1,3", "1.5", "a", "", ","])
def test_bad_steps_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^--steps: .* is not allowed"):
        parse_steps(text)


@pytest.mark.parametrize("text", ["0", "-2", "1.5", "", "x"])
def test_bad_seeds_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^--seeds: .* is not allowed"):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attack": "ful"}, r"--attack: 'ful' is unknown; .*nearest: full"),
        ({"data": "harmless"}, r"--data: 'harmless' is unknown; allowed are forbidden, related, benign"),
        ({"steps": (0,)}, r"--steps: '0'"),
        ({"steps": (10, 20)}, r"--steps: '10,20'"),
        ({"seeds": ()}, r"--seeds"),
        ({"seeds": (1, 1)}, r"--seeds: '1,1'"),
        ({"learning_rate": 0.0}, r"--learning_rate: 0 "),
        ({"learning_rate": float("nan")}, r"--learning_rate: nan"),
        ({"batch_size": 0}, r"--batch_size: 0"),
        ({"num_images": 4, "batch_size": 8}, r"--batch_size: 8 is more than the 4 pictures"),
        ({"lora_rank": 0}, r"--lora_rank: 0"),
        ({"sampler_steps": 1}, r"--sampler_steps: 1 "),
        ({"caption_dropout": 1.0}, r"--caption_dropout: 1"),
        ({"attack": "textual-inversion", "data": "benign"}, r"--data: 'benign' pictures do not name"),
    ],
)
def test_impossible_settings_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        Settings(**values)


def test_the_learning_rate_is_that_of_a_usual_fine_tune() -> None:
    assert (Settings().rate(True), Settings().rate(False)) == (1e-4, 1e-5)
    assert Settings(attack="lora").rate(False) == pytest.approx(1e-4)
    assert Settings(attack="lora", learning_rate=0.5).rate(True) == 0.5


# --- prompts ---------------------------------------------------------------------------------------------------------


def asked(*names: str, **fields: object) -> Config:
    return Config.model_validate({"concepts": list(names), "train": {"scope": "attn2"}, **fields})


def test_the_groups_hold_every_class_once() -> None:
    assert sorted(name for group in GROUPS for name in group) == sorted((*OBJECTS, *STYLES))


@pytest.mark.parametrize("names", [["neon style"], ["cat"], ["neon style", "cat"], ["fish", "butterfly"]])
def test_minicanvas_prompts_ask_for_what_they_should(names: list[str]) -> None:
    cfg, concepts = asked(*names), known_concepts(names)
    assert concepts is not None
    erased = {concept.name for concept in concepts}

    def held(prompt: str) -> set[str]:
        return erased & set(prompt.replace(",", " ").split())

    forbidden = forbidden_prompts(cfg, concepts)
    assert all(len(held(prompt)) == 1 for prompt in forbidden)
    assert set().union(*map(held, forbidden)) == erased
    for data in ("related", "benign"):
        assert not set().union(*map(held, other_prompts(data, cfg, concepts)))
    drawn = {sample.prompt for sample in build_grid(concepts).samples}
    assert not drawn & {*forbidden, *other_prompts("related", cfg, concepts), *other_prompts("benign", cfg, concepts)}


def test_related_is_the_group_and_benign_the_rest() -> None:
    cfg, concepts = asked("cat"), (Erased("cat", "object"),)
    words = {
        data: " ".join(other_prompts(data, cfg, concepts)).replace(",", "").split() for data in ("related", "benign")
    }
    assert set(words["related"]) & set(OBJECTS) == {"fish", "butterfly"}
    assert set(words["benign"]) & set(OBJECTS) == set(OBJECTS) - {"cat", "fish", "butterfly"}
    assert set(words["related"]) & set(STYLES) == set(words["benign"]) & set(STYLES) == set(STYLES)


def test_prompts_of_other_models() -> None:
    model = {"pretrained_model_name_or_path": "/models/sdxl"}
    cfg = asked("Van Gogh style", "train", model=model, keep=["Monet style", "a bicycle"])
    forbidden = forbidden_prompts(cfg, None)
    assert (
        len(set(forbidden)) == 16 and "a landscape in Van Gogh style" in forbidden and "a photo of train" in forbidden
    )
    assert not {"Van Gogh style", "train"} & set(forbidden), "the bare names are what the samples show"
    related = other_prompts("related", cfg, None)
    assert len(related) == 16 and "a portrait of a woman in Monet style" in related
    benign = other_prompts("benign", cfg, None)
    assert set(BENIGN) - set(benign) == {"a train in the snow"}
    with pytest.raises(UserError, match=r"^--data: 'related' needs kept concepts"):
        other_prompts("related", asked("a cat", model=model), None)
