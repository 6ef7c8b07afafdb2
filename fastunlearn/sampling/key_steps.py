"""Which denoising steps are trained: the key-step table of KSCU, and the uniform table of ESD and SDD.

Pure functions that turn a few integers into the ordered list of updates of a run. They know nothing of models, latents
or devices, so a table can be checked by eye and by unit tests.

Indices count sampler steps from the noisy end: 0 is the first (noisiest) step, ``num_inference_steps - 1`` the last.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

REFERENCE_STEPS = 50  # the paper states its start indices for a 50-step sampler


@dataclass(frozen=True)
class KeyStep:
    """One optimizer update: which concept, at which sampler step.

    ``restart`` says that a fresh trajectory has to be brought to ``index``; ``continues`` that the following update
    is the next sampler step of this trajectory, so that this update's predictions can advance it for free.
    """

    update: int
    concept: int
    index: int
    restart: bool
    continues: bool


def scale_start(start: int, num_inference_steps: int) -> int:
    """Map a start index on the paper's 50-step scale to another step count, keeping the fraction of the schedule."""
    return round(start * num_inference_steps / REFERENCE_STEPS)


def key_step_table(starts: list[int], num_inference_steps: int, updates: int, loop: int = 8) -> list[KeyStep]:
    """The key-step table of KSCU (arXiv 2507.06526; the released "Quick" trainer).

    Each round visits every concept once and walks its slice of the schedule from the start to the last step. After
    every ``loop`` rounds all starts advance by one step, up to 90 % of the schedule.

    Args:
        starts: first trained sampler index of each concept.
        num_inference_steps: number of sampler steps (exclusive end of every slice).
        updates: length of the table; the last traversal is cut short.
        loop: rounds between two advances of the starts.

    Raises:
        ValueError: if a start is not in ``[0, 0.9 * num_inference_steps)`` or a count is not positive.
    """
    last_start = math.ceil(0.9 * num_inference_steps) - 1
    if updates < 1 or loop < 1 or not starts:
        raise ValueError("key_step_table needs at least one concept, one update and loop >= 1")
    if any(not 0 <= start <= last_start for start in starts):
        raise ValueError(f"start indices must lie in [0, {last_start}] for {num_inference_steps} steps, got {starts}")
    visits: list[tuple[int, int]] = []
    rounds = 0
    while len(visits) < updates:
        advance = rounds // loop
        for concept, start in enumerate(starts):
            visits += [(concept, index) for index in range(min(start + advance, last_start), num_inference_steps)]
        rounds += 1
    return _link(visits[:updates])


def uniform_table(num_concepts: int, num_inference_steps: int, updates: int, seed: int) -> list[KeyStep]:
    """The table of ESD (arXiv 2303.07345): a uniformly drawn step of a fresh trajectory for every update."""
    draw = random.Random(seed)
    return [
        KeyStep(update, update % num_concepts, draw.randrange(num_inference_steps), restart=True, continues=False)
        for update in range(updates)
    ]


class KeySteps:
    """The updates that a run makes of its table: all of them in their order, but for concepts that are done.

    What it gives is numbered by the updates that are made, and linked anew where a step was left out.
    """

    def __init__(self, table: Sequence[KeyStep]) -> None:
        self._table = list(table)
        self._next, self._last = 0, -1

    def __len__(self) -> int:
        """How many updates there are at most."""
        return len(self._table)

    def take(self, update: int, done: frozenset[int] = frozenset()) -> KeyStep | None:
        """The key step of the run's update number ``update``, the next one of a concept that is not ``done``; None:
        there is none left."""
        while self._next < len(self._table) and self._table[self._next].concept in done:
            self._next += 1
        if self._next == len(self._table):
            return None
        step = self._table[self._next]
        restart = step.restart or self._last != self._next - 1
        self._last, self._next = self._next, self._next + 1
        return replace(step, update=update, restart=restart)

    def ends(self, done: frozenset[int]) -> bool:
        """Whether no update is left of a concept that is not ``done``."""
        return all(step.concept in done for step in self._table[self._next :])

    def state_dict(self) -> dict[str, int]:
        """How far the table has been walked."""
        return {"next": self._next, "last": self._last}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self._next, self._last = state["next"], state["last"]


def _link(visits: list[tuple[int, int]]) -> list[KeyStep]:
    """Mark where a trajectory starts and where the next update continues it."""
    follows = [False] + [new == (old[0], old[1] + 1) for old, new in pairwise(visits)] + [False]
    return [
        KeyStep(update, concept, index, restart=not follows[update], continues=follows[update + 1])
        for update, (concept, index) in enumerate(visits)
    ]
