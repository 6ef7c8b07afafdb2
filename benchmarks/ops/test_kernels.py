"""What each op of the kernel package costs beside eager PyTorch, torch.compile and the libraries that have the like.

On a GPU the Triton kernels; on a CPU the reference, at a small size, which tests this harness and says nothing about
the kernels. An op whose checks fail gets no speed. Sizes: KERNEL_SIZES=65536,341000192 in the environment. Run with
`make bench`; `make gpu-kernels` writes the table.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from kernel_rivals import RIVALS, UPDATES, update_bytes, update_inputs
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastunlearn_kernels.common import backend
from fastunlearn_kernels.testing.all_specs import ALL_SPECS
from fastunlearn_kernels.testing.common.spec import Inputs, OpSpec

CHECKS = Path(__file__).resolve().parents[2] / "tests" / "support" / "kernel_checks.py"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
# Latents are small: one image of SDXL has 2^16 elements.
LARGEST_LATENT = 1 << 20
UPDATE_OPS = ("surgery_dots", "surgery_coefficients", "adamw8bit_step", "blockwise_quantize")
PAIRS = [
    pytest.param(spec, name, id=f"{spec.name}-{name}".replace(" ", "_"))
    for spec in ALL_SPECS
    for name in ("ours", "eager", "compiled", *spec.baselines, *RIVALS.get(spec.name, {}))
]
# Parameters: K and V of SDXL's cross-attention, all of its cross-attention, the whole U-Net.
SIZES = (1 << 16, 341_000_192, 546_000_128, 2_567_463_936) if DEVICE.type == "cuda" else (1 << 14,)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "numel" in metafunc.fixturenames:
        asked = os.environ.get("KERNEL_SIZES", "")
        sizes = [int(float(size)) for size in asked.split(",")] if asked else SIZES
        metafunc.parametrize("numel", sizes, scope="module")


def synchronised() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture(scope="module")
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Op -> what its checks find, from a process of its own: natively on a GPU, interpreted elsewhere."""
    env = os.environ | ({} if DEVICE.type == "cuda" else {"TRITON_INTERPRET": "1"})
    wanted = [item.callspec.params.get("spec") for item in request.session.items if hasattr(item, "callspec")]
    names = {spec.name for spec in wanted if isinstance(spec, OpSpec)}
    names |= {name for item in request.session.items if item.name.startswith("test_update[") for name in UPDATE_OPS}
    report = tmp_path_factory.mktemp("checks") / "checks.json"
    command = [sys.executable, str(CHECKS), "--json", str(report), *sorted(names)]
    command += ["--quick"] if DEVICE.type != "cuda" else []  # interpreted, every dtype would take minutes
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1800)
    if not report.exists():
        return {name: [f"the checks do not run: {done.stderr.strip()[-300:]}"] for name in names}
    return json.loads(report.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def copy_bandwidth() -> float:
    """Bytes per second of the device's own copy: what a bandwidth is compared with."""
    source = torch.zeros((1 << 30) if DEVICE.type == "cuda" else (1 << 24), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(25):
        began = synchronised()
        target.copy_(source)
        seconds.append(synchronised() - began)
    return 2 * source.numel() / sorted(seconds[5:])[10]


@pytest.fixture(scope="module")
def made() -> Callable[[str, int], Inputs]:
    """Op (or "" for the whole update), elements -> inputs, made once for all competitors; only the last are kept."""
    by_name = {spec.name: spec for spec in ALL_SPECS}

    @functools.lru_cache(maxsize=1)
    def make(name: str, numel: int) -> Inputs:
        return by_name[name].bench(numel, DTYPE, DEVICE) if name else update_inputs(numel, DEVICE)

    return make


def call_of(spec: OpSpec, provider: str, inputs: Inputs) -> Callable[[], Any]:
    """One call without arguments. Where a gradient of a loss belongs to the op, it is taken too."""
    if provider in RIVALS.get(spec.name, {}):
        return RIVALS[spec.name][provider](inputs)
    functions = {"ours": spec.run, "eager": spec.eager, **spec.baselines}
    run = torch.compile(spec.eager) if provider == "compiled" else functions[provider]
    wanted = [inputs[name] for name in spec.gradients if isinstance(inputs.get(name), Tensor)]
    if not (wanted and with_gradient(spec)):
        return lambda: run(inputs)
    for tensor in wanted:
        tensor.requires_grad_()
    return lambda: torch.autograd.grad(run(inputs)[spec.of_gradient], wanted)


def with_gradient(spec: OpSpec) -> bool:
    """Losses are timed with their gradients, which the kernels make in the same pass."""
    return bool(spec.gradients) and spec.of_gradient == "loss"


def launches_of(call: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu)


def peak_extra(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@functools.cache
def machine() -> dict[str, str]:
    if DEVICE.type != "cuda":
        return {"device": "cpu", "driver": "-", "torch": torch.__version__, "triton": triton.__version__}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split()[:1] or ["?"]
    name = torch.cuda.get_device_name()
    return {"device": name, "driver": driver[0], "torch": torch.__version__, "triton": triton.__version__}


def measure(benchmark: BenchmarkFixture, make: Callable[[], Callable[[], Any]], facts: dict[str, Any]) -> None:
    """Time the call that `make` makes, and note what the table needs. What does not fit on the GPU is skipped."""
    torch._dynamo.reset()
    on_gpu = DEVICE.type == "cuda"
    try:
        call = make()
        call()  # compiles
        seconds = -synchronised()
        call()
        seconds += synchronised()
        benchmark.extra_info |= (
            machine()
            | facts
            | {
                "launches": launches_of(call) if on_gpu else None,
                "peak_extra_bytes": peak_extra(call) if on_gpu else None,
            }
        )
        # Long enough for the clock, and for the queue to hide the host where it can.
        iterations = max(1, min(200, int(0.02 / max(seconds, 1e-6))))
        benchmark.pedantic(call, rounds=20 if on_gpu else 3, iterations=iterations, warmup_rounds=2)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        pytest.skip(f"{facts['numel']} elements do not fit on this GPU")


@pytest.mark.benchmark(timer=synchronised, disable_gc=True)
@pytest.mark.parametrize(("spec", "provider"), PAIRS)
def test_op(
    benchmark: BenchmarkFixture,
    numel: int,
    spec: OpSpec,
    provider: str,
    failures: dict[str, list[str]],
    copy_bandwidth: float,
    made: Callable[[str, int], Inputs],
) -> None:
    assert not failures[spec.name], f"no speed for an op that is wrong: {failures[spec.name][0]}"
    if spec.latent and numel > LARGEST_LATENT:
        pytest.skip(f"latents have at most {LARGEST_LATENT} elements")
    facts = {"op": spec.name, "provider": provider, "numel": numel, "dtype": str(DTYPE).removeprefix("torch.")}
    facts |= {"copy_bandwidth": copy_bandwidth}

    def make() -> Callable[[], Any]:
        inputs = made(spec.name, numel)
        facts["bytes_moved"] = spec.bytes_moved(inputs)
        return call_of(spec, provider, inputs)

    measure(benchmark, make, facts)


@pytest.mark.benchmark(timer=synchronised, disable_gc=True)
@pytest.mark.parametrize("provider", UPDATES)
def test_update(
    benchmark: BenchmarkFixture,
    numel: int,
    provider: str,
    failures: dict[str, list[str]],
    copy_bandwidth: float,
    made: Callable[[str, int], Inputs],
) -> None:
    """Surgery, clipping and AdamW with 8-bit moments on bf16 parameters, from gradients to parameters."""
    for name in UPDATE_OPS:
        assert not failures[name], f"no speed for an op that is wrong: {failures[name][0]}"
    build, retain_bytes = UPDATES[provider]
    facts = {"op": "surgery + clip + AdamW8bit", "provider": provider, "numel": numel, "dtype": "bfloat16"}
    facts |= {"copy_bandwidth": copy_bandwidth, "bytes_moved": update_bytes(numel, retain_bytes)}
    measure(benchmark, lambda: build(made("", numel)), facts)


def test_backend_is_what_the_table_says() -> None:
    """`ours` is Triton on a GPU and the reference on a CPU, never the interpreter."""
    assert not backend.INTERPRETED
    assert backend.runs_triton([torch.ones(1, device=DEVICE)]) == (DEVICE.type == "cuda")
