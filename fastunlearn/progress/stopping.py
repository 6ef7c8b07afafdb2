"""When a run is probed, which of its concepts are done, when it ends, and which of its weights remain.

Decisions from readings alone, the same on every rank; nothing here draws or trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastunlearn.progress.reading import Reading

if TYPE_CHECKING:
    from fastunlearn.schema.sections import ProgressConfig

FIRST_PROBE = 2
CLOSER = {32: 2, 64: 2, 128: 4}
"""From each of these powers of two on, into so many parts the way to the next is divided."""


def next_probe(update: int, every: str | int) -> int:
    """The first update after ``update`` at which a run is probed: 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, ... where
    ``every`` is "auto", else its multiples."""
    if isinstance(every, int):
        return (update // every + 1) * every
    if update < FIRST_PROBE:
        return FIRST_PROBE
    power = 1 << update.bit_length() - 1
    parts = max((parts for start, parts in CLOSER.items() if power >= start), default=1)
    return power + ((update - power) * parts // power + 1) * power // parts


def probes_of(updates: int, every: str | int) -> Iterator[int]:
    """At which updates a run of so many is probed that nothing ends before: the last one is always."""
    update = next_probe(0, every)
    while update < updates:
        yield update
        update = next_probe(update, every)
    if updates:
        yield updates


@dataclass
class Progress:
    """How far a run has come by its probes so far."""

    settings: ProgressConfig
    stops: bool
    """Whether it ends when the concepts are gone, and keeps its best probe's weights; else it only watches."""
    readings: list[Reading] = field(default_factory=list)
    start: int = 0
    """The updates before the model itself is changed; they do not count."""

    @property
    def due(self) -> int:
        """The update after which the next probe comes."""
        last = self.readings[-1].update if self.readings else self.start
        return self.start + next_probe(last - self.start, self.settings.every)

    def add(self, reading: Reading) -> bool:
        """Enter a probe; whether it is the best so far, whose weights remain if no better one comes."""
        before = self.best
        self.readings.append(reading)
        return self.best is not before

    def holds(self, reading: Reading, concept: int) -> bool:
        """Whether the concept is gone from as much of the probe as was asked for."""
        asked = self.settings
        seen = reading.recognised is not None and reading.recognised[concept] > 1 - asked.share
        return reading.share(concept) >= asked.share and reading.low(concept) >= asked.quantile and not seen

    def all_hold(self, reading: Reading) -> bool:
        """``holds`` for every concept."""
        return all(self.holds(reading, concept) for concept in range(len(reading.moved)))

    @property
    def done(self) -> frozenset[int]:
        """The concepts that were gone in the last probes: they are not trained until one shows them again."""
        last = self.readings[-self.settings.in_a_row :]
        if not self.stops or len(last) < self.settings.in_a_row:
            return frozenset()
        concepts = range(len(last[0].moved))
        return frozenset(c for c in concepts if all(self.holds(reading, c) for reading in last))

    @property
    def ended(self) -> str | None:
        """Why no update follows: "erased", or "drift" where what is kept has changed too much; None: go on."""
        if not self.stops or not self.readings:
            return None
        if len(self.done) == len(self.readings[-1].moved):
            return "erased"
        limit = self.settings.max_drift
        return "drift" if limit is not None and self.readings[-1].drift > limit else None

    @property
    def best(self) -> Reading | None:
        """The probe whose weights remain: erased first, then with the least drift; before any is erased, the one that
        is nearest to it among those that have not drifted too far. One probe alone may be luck: only the last of as
        many in a row as were asked for counts as erased."""
        if not self.readings:
            return None
        return self.readings[max(range(len(self.readings)), key=self._rank)]

    def _rank(self, number: int) -> tuple[Any, ...]:
        reading = self.readings[number]
        row = self.readings[max(0, number + 1 - self.settings.in_a_row) : number + 1]
        confirmed = len(row) == self.settings.in_a_row and all(self.all_hold(one) for one in row)
        limit, drift = self.settings.max_drift, 0.0 if math.isnan(reading.drift) else reading.drift
        within = limit is None or drift <= limit
        if confirmed:
            return within, True, -drift, 0.0, -reading.update
        return within, False, _or_zero(reading.worst_share), _or_zero(reading.least_moved), -drift

    def state_dict(self) -> dict[str, Any]:
        """The probes so far."""
        return {"readings": [reading.as_json() for reading in self.readings]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after them."""
        self.readings = [Reading.from_json(data) for data in state["readings"]]


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
