"""Where the time of an update goes, and where its memory peaks, without asking the device to wait.

A stack of labels: each change of the label leaves a mark (a CUDA event, or the time on a CPU), and the time between two
marks belongs to the label that was on top, so nested phases are not counted twice. In a pass of its own the same marks
read the allocator's peak instead. For single kernels see ``profiling.py``.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

PHASES = (
    "restart", "rollout", "teacher", "forward", "backward", "surgery", "meta", "optimizer", "step_in_backward", "other",
)  # fmt: skip
UNDIVIDED = ("restart", "meta")
"""Whatever these call is theirs."""


class Watchable(Protocol):
    """What can tell the clock which calls belong to which phase: ``subjects.protocol.Subject``."""

    def watch(self, clock: Clock) -> None: ...


class Clock:
    """Marks of one run. ``memory``: the peak of each phase instead of its time."""

    def __init__(self, device: torch.device, memory: bool = False) -> None:
        self._cuda = device.type == "cuda"
        self._device, self._memory = device, memory
        self._stack = ["outside"]
        self._marks: list[tuple[Any, str, int]] = []
        self._watched: list[tuple[Any, str]] = []
        self.peaks: dict[str, int] = defaultdict(int)
        self.update = 0

    def enter(self, label: str) -> None:
        """From now on, time is ``label``'s, unless an undivided phase is at work."""
        label = self._stack[-1] if self._stack[-1] in UNDIVIDED else label
        self._mark(self._stack[-1], label)
        self._stack.append(label)

    def leave(self) -> None:
        """Time goes on for what was interrupted."""
        left = self._stack.pop()
        self._mark(left, self._stack[-1])

    def watch(self, owner: Any, method: str, label: str) -> None:
        """Give all time inside ``owner.method`` to ``label``, for this object only."""
        real: Callable[..., Any] = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(label)
            try:
                return real(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, method, call)
        self._watched.append((owner, method))

    def watch_all(self, subject: Watchable) -> Callable[[], None]:
        """Watch the phases of a subject; returns what ends it."""
        subject.watch(self)

        def end() -> None:
            for owner, method in self._watched:
                delattr(owner, method)  # the class's own is found again
            self._watched.clear()

        return end

    def forget(self) -> None:
        """Drop all marks so far."""
        self._marks.clear()

    def seconds(self) -> dict[int, dict[str, float]]:
        """For each update the seconds of each of its phases. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        found: dict[int, dict[str, float]] = {}
        for (begin, label, update), (end, *_) in zip(self._marks, self._marks[1:], strict=False):
            if label != "outside":
                phases = found.setdefault(update, defaultdict(float))
                phases[label] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        return found

    def _mark(self, left: str, label: str) -> None:
        if self._memory:
            if self._cuda:
                self.peaks[left] = max(self.peaks[left], torch.cuda.max_memory_allocated(self._device))
                torch.cuda.reset_peak_memory_stats(self._device)
            return
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((event, label, self.update))
        else:
            self._marks.append((time.perf_counter(), label, self.update))


def medians(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median over the updates of each phase; a phase that an update does not have took it no time."""
    names = [name for name in PHASES if any(name in update for update in updates)]
    return {name: statistics.median(update.get(name, 0.0) for update in updates) for name in names}
