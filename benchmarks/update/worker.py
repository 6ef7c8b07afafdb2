"""One row, measured in a process of its own: so that a row that runs out of memory takes no other with it.

Prepare the subject, warm up, time updates phase by phase, read the memory of each phase in a pass of its own, and write
what was found; or why there is nothing. With several ranks every rank does all of it, and the first one writes.
``figures.py`` derives the rest.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastunlearn.errors import UserError
from fastunlearn.planning.plan import ALLOWANCE
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.utils.distributed import disconnect
from fastunlearn.utils.memory import peak_memory_bytes
from update.baselines import named
from update.instruments.clock import Clock, medians
from update.instruments.counters import Counter, count_sent, questions
from update.instruments.environment import device_environment
from update.instruments.flops import peak_rate
from update.instruments.profiling import profile_update
from update.ours import Ours
from update.rows import Row, config_of
from update.subjects.protocol import Subject

GIB = 2**30
SIGNS_OF_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory")


def work(row: Row, updates: int, warmup: int, walk: int, result: Path) -> None:
    """Measure ``row`` and write ``result`` as JSON. ``walk``: sampler steps of a measured restart."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    found: dict[str, Any] = {"environment": device_environment(device)}
    try:
        with capped(row["cap"], device):
            found |= measure(row, updates, warmup, walk, device)
            found["status"] = "measured"
    except UserError as error:
        found |= {"status": "refused", "reason": str(error)}
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not no_memory(error):
            raise
        found |= {"status": "does not fit", "reason": first_line(error)}
        if device.type == "cuda":
            found["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    finally:
        disconnect()
    if os.environ.get("RANK", "0") == "0":
        result.write_text(json.dumps(found), encoding="utf-8")


def no_memory(error: BaseException) -> bool:
    """Whether this is what a full card, or a full host, looks like."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(s in text for s in SIGNS_OF_NO_MEMORY)


def first_line(error: BaseException) -> str:
    """For the table."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def capped(cap: str, device: torch.device) -> Iterator[None]:
    """A smaller card: PyTorch's allocator gets ``cap`` GiB less what a card's context takes (the planner's allowance).

    Raises:
        UserError: on a CPU, or on a card that is smaller itself.
    """
    if cap == "none":
        yield
        return
    if device.type != "cuda":
        raise UserError(f"--memory-cap-gb: {cap} needs a GPU; a CPU process has no such limit. Leave it out")
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = float(cap) * GIB - ALLOWANCE
    if not 0 < allowed < total:
        raise UserError(f"--memory-cap-gb: {cap} is no emulation on a card of {total / GIB:.1f} GiB; give less, over 1")
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)
    yield


def measure(row: Row, updates: int, warmup: int, walk: int, device: torch.device) -> dict[str, Any]:
    """All figures of a row that were read off the machine."""
    peak, product = peak_rate(device)
    before = peak_memory_bytes(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    sent = count_sent()
    subject = build_subject(row, device)
    if row["whole"] == "true":
        return {"peak_flops": peak, "peak_product": product} | whole_run(subject, device)
    steps = subject.steps()[: warmup + updates]
    if len(steps) < warmup + updates:
        raise UserError(f"--updates: the run has {len(subject.steps())}, fewer than {warmup} + {updates}")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found = timed(subject, steps, warmup, walk, device, sent)
    highest = peak_memory_bytes(device)
    found["phase_peak_bytes"] = memory_of_phases(subject, steps[-1], walk, device)
    found |= {
        "peak_memory_bytes": max(highest, *found["phase_peak_bytes"].values(), 0),
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        "bytes_before_the_model": before,
        "peak_flops": peak,
        "peak_product": product,
    }
    if row["profile"] == "true":
        found["profile"] = profile_update(lambda: subject.update(steps[-1]), device)
    return found


def build_subject(row: Row, device: torch.device) -> Subject:
    """The trainer's run of this row, or the baseline that it names, ready for its first update."""
    cfg = config_of(row, device.type == "cuda", short=True)
    return Ours(cfg, row, device) if row["baseline"] == "ours" else named.build(row["baseline"], cfg, row, device)


def timed(
    subject: Subject, steps: Sequence[KeyStep], warmup: int, walk: int, device: torch.device, sent: Counter
) -> dict[str, Any]:
    """Of one restart the seconds and evaluations; of the updates the phases' medians, and means of what is counted."""
    clock = Clock(device)
    unwatch = clock.watch_all(subject)
    subject.restart(steps[0], 1)
    for step in steps[:warmup]:
        one(subject, clock, step)
    clock.forget()
    start = subject.models.evaluations.total
    clock.update = -1
    subject.restart(steps[0], walk)
    restarted = subject.models.evaluations.total - start
    before, meta_before = asdict(subject.models.evaluations), asdict(subject.of_meta)
    sent.total = 0
    with questions() as asked:
        for number, step in enumerate(steps[warmup:]):
            clock.update = number
            one(subject, clock, step)
    after, meta_after, bytes_sent = asdict(subject.models.evaluations), asdict(subject.of_meta), sent.total
    seconds = clock.seconds()
    unwatch()
    restart = seconds.pop(-1, {})
    count = len(steps) - warmup
    phases = [seconds[number] for number in sorted(seconds)]
    return {
        "updates": count,
        "restart": {"seconds": sum(restart.values()), "evaluations": restarted},
        "seconds": medians(phases),
        "update_seconds": sorted(sum(update.values()) for update in phases),
        "evaluations": {name: (after[name] - before[name]) / count for name in after},
        "meta_evaluations": {name: (meta_after[name] - meta_before[name]) / count for name in after},
        "bytes_sent": bytes_sent / count,
        "values_asked": asked.total / count,
    }


def one(subject: Subject, clock: Clock, step: KeyStep) -> None:
    """One update; what no phase claims is "other"."""
    clock.enter("other")
    subject.update(step)
    clock.leave()


def memory_of_phases(subject: Subject, step: KeyStep, walk: int, device: torch.device) -> dict[str, int]:
    """The allocator's peak while each phase ran; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    clock = Clock(device, memory=True)
    unwatch = clock.watch_all(subject)
    subject.restart(step, walk)
    one(subject, clock, step)
    unwatch()
    clock.peaks.pop("outside", None)
    return dict(clock.peaks)


def whole_run(subject: Subject, device: torch.device) -> dict[str, Any]:
    """Every update with its restart, by the wall clock: the check of what the other rows work out."""
    started = time.perf_counter()
    for step in subject.steps():
        if step.restart:
            subject.restart(step, step.index)
        subject.update(step)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {
        "whole_run": {
            "seconds": time.perf_counter() - started,
            "updates": len(subject.steps()),
            "evaluations": asdict(subject.models.evaluations),
        },
        "peak_memory_bytes": peak_memory_bytes(device),
    }
