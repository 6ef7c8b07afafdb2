"""What an attack is asked to do: names, defaults, and the refusal of what makes no sense.

Plain values and text, so that a mistake is answered before torch is loaded. The run's folder is checked where a test is
prepared, in ``relearning/task.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fastunlearn.errors import UserError, nearest
from fastunlearn.registry import ATTACKS

DATA = {
    "forbidden": "pictures of the erased concept",
    "related": "pictures of kept concepts close to it",
    "benign": "pictures that have nothing to do with it",
}
DEFAULT_STEPS = (0, 10, 50, 100, 300)
# A fine-tune's usual rate, on the embedded model and on Stable Diffusion.
BASE_RATES = {True: 1e-4, False: 1e-5}


@dataclass(frozen=True)
class Settings:
    """One attack. Fields are called as the options of ``fastunlearn relearn``.

    Raises:
        UserError: a value is not allowed.
    """

    attack: str = "full"
    data: str = "forbidden"
    steps: tuple[int, ...] = DEFAULT_STEPS
    """When to measure, in attack steps; 0, the model as it was erased, is always among them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rate: float | None = None
    batch_size: int = 8
    num_images: int = 64
    """Pictures that the attacker has, and as many held-out ones."""
    images: str | None = None
    """Folder of the attacker's own pictures with captions."""
    lora_rank: int = 4
    caption_dropout: float = 0.0
    sampler_steps: int | None = None
    """Of the pictures that the classifier looks at; None: as many as the run's own evaluation takes."""

    def __post_init__(self) -> None:
        attack = ATTACKS.get_known(self.attack)
        _check_choice("--data", self.data, DATA)
        _check_steps(self.steps)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise UserError(
                f"--seeds: {_listed(self.seeds)!r} is not allowed; at least one is needed, each once, from 0"
            )
        for name in ("batch_size", "num_images", "lora_rank"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: {getattr(self, name)} is not allowed; at least 1 is needed")
        rate = self.learning_rate
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise UserError(f"--learning_rate: {rate:g} is not allowed; a number above 0 is needed")
        if self.sampler_steps is not None and not 2 <= self.sampler_steps <= 1000:
            raise UserError(f"--sampler_steps: {self.sampler_steps} is not allowed; from 2 to 1000")
        if not 0 <= self.caption_dropout < 1:
            raise UserError(f"--caption_dropout: {self.caption_dropout:g} is not allowed; from 0 to below 1")
        if self.images is None:
            check_size(self.num_images, self.batch_size)
        attack.refuse(self)

    def rate(self, minicanvas: bool) -> float:
        """The given learning rate, or the usual one for this attack on this kind of model."""
        return self.learning_rate or BASE_RATES[minicanvas] * ATTACKS[self.attack].rate_factor


def parse_steps(text: str) -> tuple[int, ...]:
    """``"0,10,50"`` as numbers, with 0 put first where it is missing.

    Raises:
        UserError: not whole numbers, or not increasing.
    """
    steps = _numbers("--steps", text)
    _check_order(steps)
    return steps if steps[0] == 0 else (0, *steps)


def parse_seeds(text: str) -> tuple[int, ...]:
    """``"3"``: the seeds 0, 1 and 2; ``"4,7"`` (or ``"4,"``): just these.

    Raises:
        UserError: not whole numbers, or none.
    """
    seeds = _numbers("--seeds", text)
    if "," in text:
        return seeds
    if seeds[0] < 1:
        raise UserError(f"--seeds: {text!r} is not allowed; give a number of at least 1, or a list such as 4,7")
    return tuple(range(seeds[0]))


def check_size(pictures: int, batch_size: int) -> None:
    """Raises UserError where the attacker has fewer pictures than one batch."""
    if pictures < batch_size:
        raise UserError(
            f"--batch_size: {batch_size} is more than the {pictures} pictures of the attack; "
            f"use at most {pictures}, or more pictures"
        )


def _check_choice(field: str, name: str, known: dict[str, str]) -> None:
    if name not in known:
        raise UserError(f"{field}: {name!r} is unknown; allowed are {', '.join(known)}{nearest(name, known)}")


def _check_steps(steps: Sequence[int]) -> None:
    _check_order(steps)
    if steps[0] != 0 or len(steps) < 2:
        raise UserError(f"--steps: {_listed(steps)!r} is not allowed; 0 and at least one later step are needed")


def _check_order(steps: Sequence[int]) -> None:
    if not steps or min(steps) < 0 or any(a >= b for a, b in pairwise(steps)):
        raise UserError(f"--steps: {_listed(steps)!r} is not allowed; increasing whole numbers from 0 are needed")


def _numbers(field: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.removeprefix("-").isdecimal() for part in parts):
        raise UserError(f"{field}: {text!r} is not allowed; whole numbers are needed, such as 0,10,50")
    return tuple(int(part) for part in parts)


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(str(number) for number in numbers)
