"""What one update does to the device: kernels by kind, and every time that the host waits for it.

One update under ``torch.profiler``, read from its trace; and one under PyTorch's warnings about waiting, which name the
line of Python. On a CPU only the values that Python asks tensors for are counted. A profiled update is slower than
others, so its time is not reported.
"""

from __future__ import annotations

import gzip
import json
import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

UPDATE = "one update"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
OURS = (
    "adamw8bit_step", "add_noise_kernel", "blockwise_", "guided_noise_loss", "guided_step", "surgery_",
    "weighted_noise_loss",
)  # fmt: skip
# First match wins.
KINDS = (
    ("ours (Triton)", re.compile("|".join(OURS))),
    ("attention", re.compile(r"flash|fmha|attention|sdpa|softmax", re.I)),
    ("convolution", re.compile(r"conv|winograd|wgrad|dgrad|implicit_gemm|nchwToNhwc|nhwcToNchw", re.I)),
    ("matrix products", re.compile(r"gemm|cutlass|cublas|nvjet|xmma|matmul|splitK", re.I)),
    ("norms", re.compile(r"norm|RowwiseMoments|Welford", re.I)),
    ("optimizer of a library", re.compile(r"multi_tensor|adam|kOptimizer|Optimizer", re.I)),
    ("copies and fills", re.compile(r"memcpy|memset|copy|fill|CatArray", re.I)),
    ("element by element", re.compile(r"elementwise|vectorized|gelu|silu|reduce", re.I)),
)


def kind_of(kernel: str) -> str:
    """Which kind of work a kernel's name suggests."""
    return next((name for name, pattern in KINDS if pattern.search(kernel)), "other")


def profile_update(update: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Run ``update`` twice: once under the profiler, once with every wait reported."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        with record_function(UPDATE):
            update()
        if cuda:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json.gz"
        profiler.export_chrome_trace(str(file))
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            events = json.load(stream)["traceEvents"]
    return read_trace(events) | ({"wait_sites": wait_sites(update)} if cuda else {})


def read_trace(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the update in a Chrome trace; times in seconds.

    Kernels belong to the update whose launch lies in it: the device is behind the host.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    window = next(e for e in complete if e["name"] == UPDATE and e.get("cat") == "user_annotation")
    begin, end = window["ts"], window["ts"] + window["dur"]
    inside = [e for e in complete if begin <= e["ts"] <= end]
    runtime = [e for e in inside if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    launched = {e["args"]["correlation"] for e in runtime if "correlation" in e.get("args", {})}
    on_device = [
        e for e in complete
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and e.get("args", {}).get("correlation") in launched
    ]  # fmt: skip
    by_kind: dict[str, float] = defaultdict(float)
    by_name: Counter[str] = Counter()
    for event in on_device:
        by_kind[kind_of(event["name"])] += event["dur"] / 1e6
        by_name[event["name"][:90]] += event["dur"] / 1e6
    span = (
        max(e["ts"] + e["dur"] for e in on_device) - min(e["ts"] for e in on_device) if on_device else 0.0
    ) / 1e6  # fmt: skip
    return {
        "host_seconds": window["dur"] / 1e6,
        "device_span_seconds": span,
        "device_busy_seconds": busy_seconds(on_device),
        "waits": {name: sum(e["name"] == name for e in runtime) for name in WAITS},
        "copies_to_host": sum("DtoH" in e["name"] for e in on_device),
        "values_asked": sum(e["name"] == "aten::_local_scalar_dense" for e in inside),
        "launches": sum(e["name"] in LAUNCHES for e in runtime),
        "by_kind": dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        "longest": dict(by_name.most_common(12)),
    }


def busy_seconds(events: list[dict[str, Any]]) -> float:
    """How long at least one of them ran."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e["ts"]):
        end = event["ts"] + event["dur"]
        total += max(0.0, end - max(event["ts"], until))
        until = max(until, end)
    return total / 1e6


def wait_sites(update: Callable[[], None]) -> dict[str, int]:
    """file:line -> how often it made the host wait, by PyTorch's own account (it does not see libraries' waits)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = Counter(
        f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
    )
    return dict(found.most_common())
