"""What reads the machine for the benchmarks, on clocks, traces and counts that are known."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastunlearn.models.formats.folder_configs import PUBLIC_MODELS
from update.instruments.clock import Clock, medians
from update.instruments.counters import questions
from update.instruments.flops import unet_flops
from update.instruments.profiling import kind_of, profile_update, read_trace

CPU = torch.device("cpu")


def test_questions_are_counted_inside_only() -> None:
    x = torch.ones(2)
    with questions() as asked:
        bool(x[0] > 0), x.tolist(), float(x[1])
    x.sum().item()
    assert asked.total == 3


def test_flops_of_stable_diffusion_are_those_known() -> None:
    """SD 1.x at 512 px: 0.803 TFLOP forward; to train all attn2 layers, 1.11 times that back."""
    flops = unet_flops(json.dumps(dict(PUBLIC_MODELS["sd15"].unet)), "attn2", 64, 77)
    assert flops.forward / 1e12 == pytest.approx(0.803, abs=0.001)
    assert flops.backward / flops.forward == pytest.approx(1.11, abs=0.01)


def test_the_clock_counts_no_second_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"t": 0.0}
    monkeypatch.setattr("update.instruments.clock.time.perf_counter", lambda: now["t"])

    def spend(seconds: float) -> None:
        now["t"] += seconds

    class Thing(nn.Module):
        def inner(self) -> None:
            spend(3.0)

        def outer(self) -> None:
            spend(1.0)
            self.inner()
            spend(1.0)

        def watch(self, clock: Clock) -> None:
            clock.watch(self, "inner", "teacher")
            clock.watch(self, "outer", "backward")

    thing, clock = Thing(), Clock(CPU)
    unwatch = clock.watch_all(thing)
    for clock.update in range(3):
        spend(10.0)
        clock.enter("other")
        thing.outer()
        spend(0.5)
        clock.leave()
    clock.enter("restart")
    thing.inner()
    clock.leave()
    unwatch()
    found = clock.seconds()
    assert found[0] == {"other": 0.5, "backward": 2.0, "teacher": 3.0} == found[1]
    assert found[2] == {"other": 0.5, "backward": 2.0, "teacher": 3.0, "restart": 3.0}
    assert medians([found[0], found[1], {"other": 9.0}]) == {"teacher": 3.0, "backward": 2.0, "other": 0.5}
    thing.outer()
    assert clock.seconds() == found, "the methods are the class's own again"


def test_the_clock_gives_a_peak_to_the_phase_that_reached_it(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = {"bytes": 0}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: peak["bytes"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: peak.update(bytes=0))
    clock = Clock(torch.device("cuda", 0), memory=True)
    peak["bytes"] = 5
    clock.enter("other")
    peak["bytes"] = 7
    clock.enter("backward")
    peak["bytes"] = 40
    clock.enter("step_in_backward")
    peak["bytes"] = 20
    clock.leave()
    peak["bytes"] = 30
    clock.leave()
    peak["bytes"] = 3
    clock.leave()
    assert clock.peaks == {"outside": 5, "other": 7, "backward": 40, "step_in_backward": 20}


def test_a_trace_is_read_by_what_the_update_launched(tmp_path: Path) -> None:
    """Two kernels that overlap, launched in the update though they run after it; one of before; one wait of two."""

    def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> dict[str, Any]:
        args = {} if correlation is None else {"correlation": correlation}
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    events = [
        event("user_annotation", "one update", 100, 50),
        event("cuda_runtime", "cudaLaunchKernel", 90, 1, 1), event("kernel", "old_gemm", 95, 40, 1),
        event("cuda_runtime", "cudaLaunchKernel", 110, 1, 2), event("kernel", "flash_fwd", 160, 20, 2),
        event("cuda_driver", "cuLaunchKernelEx", 120, 1, 3), event("kernel", "surgery_dots_chunk_kernel", 170, 30, 3),
        event("cuda_runtime", "cudaMemcpyAsync", 125, 1, 4), event("gpu_memcpy", "Memcpy DtoH (Device)", 210, 10, 4),
        event("cuda_runtime", "cudaStreamSynchronize", 126, 2), event("cuda_runtime", "cudaStreamSynchronize", 300, 2),
        event("cpu_op", "aten::_local_scalar_dense", 124, 5), {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    found = read_trace(events)
    assert found["waits"]["cudaStreamSynchronize"] == 1 and found["copies_to_host"] == 1 == found["values_asked"]
    assert found["launches"] == 2
    assert found["by_kind"] == pytest.approx({"ours (Triton)": 30e-6, "attention": 20e-6, "copies and fills": 10e-6})
    assert found["device_busy_seconds"] == pytest.approx(50e-6)
    assert found["device_span_seconds"] == pytest.approx(60e-6)
    assert kind_of("sm90_xmma_gemm_bf16") == "matrix products" and kind_of("who knows") == "other"


def test_a_profiled_update_counts_the_values_that_python_asks_for() -> None:
    x = torch.ones(4)

    def update() -> None:
        (x * 2).sum().item()
        bool(x[0] > 0)

    found = profile_update(update, CPU)
    assert found["values_asked"] == 2 and found["launches"] == 0 and found["by_kind"] == {}


def test_gzip_is_what_the_profiler_writes(tmp_path: Path) -> None:
    """Pinned, because the reader relies on the file's ending."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(2).sum()
    profiler.export_chrome_trace(str(tmp_path / "trace.json.gz"))
    with gzip.open(tmp_path / "trace.json.gz", "rt", encoding="utf-8") as stream:
        assert json.load(stream)["traceEvents"]
