"""Every op of the kernel package against its fp64 reference, from its spec: on a GPU natively, elsewhere interpreted.

What a case is held to is in kernel_checks.py. Properties that belong to one op are in the files named after it.
"""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kernel_checks as checks
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastunlearn_kernels
from fastunlearn_kernels.common import backend, scratch
from fastunlearn_kernels.testing.all_specs import ALL_SPECS
from fastunlearn_kernels.testing.common.spec import SHORT, Case, Inputs, OpSpec, copied

DEVICE = checks.device()
OPS = {
    "add_noise",
    "guided_noise_loss",
    "weighted_noise_loss",
    "guided_step",
    "surgery_dots",
    "surgery_coefficients",
    "surgery_apply",
    "blockwise_quantize",
    "blockwise_dequantize",
    "adamw8bit_step",
}
RUNS = [
    pytest.param(spec, case, dtype, id=f"{spec.name}-{case.name}-{SHORT.get(dtype, str(dtype))}".replace(" ", "_"))
    for spec in ALL_SPECS
    for case, dtype in checks.all_cases(spec)
]
each_op = pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda spec: spec.name)


def small_case(spec: OpSpec) -> Inputs:
    """About 1000 elements in an ordinary layout, in bf16 where the op has that."""
    by_name = {case.name: case for case in spec.cases}
    case: Case = by_name.get("1000 elements", spec.cases[-1])
    dtype = torch.bfloat16 if torch.bfloat16 in case.dtypes else case.dtypes[0]
    return checks.case_inputs(spec, case, dtype, DEVICE)


def test_every_op_has_a_spec() -> None:
    assert {spec.name for spec in ALL_SPECS} == OPS


@each_op
def test_cases_cover_the_sizes_and_layouts_that_matter(spec: OpSpec) -> None:
    names = " ".join(case.name for case in spec.cases)
    assert spec.cases and spec.kernels and spec.launches >= 1
    if spec.name != "surgery_coefficients":
        for size in ("0 elements", "1 element", "63 elements", "1000 elements", "unaligned"):
            assert size in names, f"{spec.name} has no case named {size}"


@pytest.mark.parametrize("path", sorted(Path(fastunlearn_kernels.__file__).parent.rglob("*.py")), ids=lambda p: p.stem)
def test_every_argument_of_a_kernel_says_what_it_is(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
            bare = [argument.arg for argument in node.args.args if "  # " not in lines[argument.lineno - 1]]
            assert not bare, f"{node.name}: a comment gives the meaning and the shape of {', '.join(bare)}"


@pytest.mark.parametrize(("spec", "case", "dtype"), RUNS)
def test_kernel_equals_the_fp64_reference(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    checks.check_case(spec, case, dtype, DEVICE)


@pytest.mark.parametrize(("spec", "case", "dtype"), RUNS)
def test_reference_in_low_precision_equals_the_fp64_reference(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    checks.check_case(spec, case, dtype, torch.device("cpu"), "reference")


@pytest.mark.parametrize(
    ("spec", "case"),
    [
        pytest.param(spec, case, id=f"{spec.name}-{case.name}".replace(" ", "_"))
        for spec in ALL_SPECS
        if spec.gradients
        for case in spec.cases
    ],
)
def test_gradients_are_the_derivative(spec: OpSpec, case: Case) -> None:
    checks.check_derivative(spec, case, torch.device("cpu"))


class Calls(TorchDispatchMode):
    """Collects the arguments with which one registered op is called."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.op = getattr(torch.ops.fastunlearn, name).default
        self.arguments: list[tuple[tuple, dict]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is self.op:
            self.arguments.append((args, kwargs or {}))
        return func(*args, **kwargs or {})


@pytest.fixture(params=["reference", "triton"])
def either_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with backend.force(request.param):
        yield request.param


@each_op
def test_opcheck(spec: OpSpec, either_backend: str) -> None:
    """Schema (what is written in place), fake implementation, autograd and tracing agree with the op."""
    inputs = small_case(spec)
    with Calls(spec.name) as calls:
        spec.run(copied(inputs))
    assert calls.arguments, f"run() never calls fastunlearn::{spec.name}"
    schema = calls.op._schema.arguments
    args, kwargs = calls.arguments[0]
    fresh = tuple(_fresh(value, argument.name in spec.gradients) for value, argument in zip(args, schema))
    torch.library.opcheck(calls.op, fresh, kwargs)


def _fresh(value: Any, differentiable: bool) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(differentiable and value.is_floating_point())
    return [_fresh(item, differentiable) for item in value] if isinstance(value, (list, tuple)) else value


@each_op
def test_compiles_without_a_graph_break(spec: OpSpec, either_backend: str) -> None:
    torch._dynamo.reset()
    inputs = small_case(spec)
    expected = dict(checks.leaves(spec.run(copied(inputs))))
    compiled = torch.compile(spec.run, fullgraph=True, backend="aot_eager")
    got = dict(checks.leaves(compiled(copied(inputs))))
    assert got.keys() == expected.keys()
    for name in got:
        assert checks.same_bits(got[name], expected[name]), name


@pytest.mark.skipif(not backend.INTERPRETED, reason="launches are counted by the interpreter; see the test for GPUs")
@each_op
def test_as_many_launches_as_the_spec_says(spec: OpSpec) -> None:
    with backend.force("triton"), checks.counted_launches() as names:
        spec.run(small_case(spec))
    assert len(names) == spec.launches, names


@each_op
def test_bytes_moved_and_bench_inputs_belong_together(spec: OpSpec) -> None:
    """Twice the elements, about twice the bytes; otherwise a bandwidth would mean nothing."""
    few, many = (spec.bytes_moved(spec.bench(n, torch.bfloat16, torch.device("cpu"))) for n in (1 << 13, 1 << 14))
    # surgery_coefficients sees segments, not elements.
    assert few > 0 and (spec.name == "surgery_coefficients" or 1.9 < many / few < 2.1)


on_flat_buffers = pytest.mark.parametrize(
    "spec",
    [spec for spec in ALL_SPECS if not spec.latent and spec.name != "surgery_coefficients"],
    ids=lambda spec: spec.name,
)


@on_flat_buffers
def test_a_part_of_a_buffer_comes_out_as_it_does_alone(spec: OpSpec) -> None:
    checks.check_large(spec, 3 * 16384, DEVICE)


# --- the choice of the backend ----------------------------------------------------------------------------------------


def test_an_unknown_choice_names_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="auto, reference, triton"):
        backend.runs_triton([torch.ones(1)])
    with pytest.raises(ValueError, match="auto, reference, triton"), backend.force("cuda"):
        pass


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="use auto, or set TRITON_INTERPRET=1"):
        backend.runs_triton([torch.ones(1)])


def test_auto_takes_the_reference_on_the_cpu_and_fp64_always_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    assert not backend.runs_triton([torch.ones(1)])
    with backend.force("triton"):
        assert not backend.runs_triton([torch.ones(1, dtype=torch.float64)])


def test_the_choice_is_logged_once_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    backend._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="fastunlearn_kernels"), backend.force("auto"):
        for _ in range(3):
            backend.runs_triton([torch.ones(1)])
    assert [record.getMessage() for record in caplog.records] == ["kernels: reference (auto: tensors on cpu)"]


def test_tensors_on_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="several devices"):
        backend.runs_triton([torch.ones(1), torch.ones(1, device="meta")])


def in_fresh_process(code: str) -> set[str]:
    """The words that the code prints, not interpreting kernels."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, timeout=120)
    return set(done.stdout.split())


def test_the_package_brings_torch_and_triton_only() -> None:
    found = in_fresh_process(
        "import sys, torch, triton; before = {n.split('.')[0] for n in sys.modules};"
        "import fastunlearn_kernels, fastunlearn_kernels.testing.all_specs;"
        "print(*sorted({n.split('.')[0] for n in sys.modules} - before - sys.stdlib_module_names))"
    )
    # What torch and triton themselves import when they are first used is theirs.
    assert found - {"numpy"} == {"fastunlearn_kernels"}


USE_OF_EVERY_OP = """
import sys
import torch
import fastunlearn_kernels as fk
x, t, one = torch.randn(2, 4, 8, 8), torch.tensor([3, 5]), torch.ones(2)
fk.add_noise(x, x, t, torch.linspace(0.9, 0.1, 10))
fk.guided_noise_loss(x, x, x, x, x, guidance=1.0)
fk.weighted_noise_loss(x, x, torch.tensor([0, 1]), one)
fk.guided_step(x, x, fk.ddim_step(x, x, 0.2, 0.3), 0.3, 0.4, guidance=2.0)
fk.guided_euler_step(fk.apply_guidance(x, x, 2.0), x, fk.to_epsilon(x, x, 0.5, "sample"), 2.0, 1.0, guidance=2.0)
unlearn, retain = [torch.randn(5000)], fk.blockwise_quantize([torch.randn(5000)])
segments = fk.Segments(((0, 0, 5000, 0),), 1)
plan = fk.surgery_coefficients(fk.surgery_dots(unlearn, retain, segments), max_norm=1.0)
fk.surgery_apply(unlearn, fk.blockwise_dequantize(retain), segments, plan)
p = torch.nn.Parameter(torch.zeros(5000))
p.grad = torch.ones(5000)
fk.AdamW8bit([p]).step(retain=retain, plan=plan, segments=segments)
fk.adamw8bit_step([p.data], [p.grad], [p.grad * 0], [p.grad * 0], step=1, lr=0.1)
assert fk.Plan is fk.SurgeryPlan
print("done", *[name for name in sys.modules if name.startswith("fastunlearn_kernels.testing")])
"""


def test_cases_and_checks_are_not_imported_at_run_time() -> None:
    assert in_fresh_process(USE_OF_EVERY_OP) == {"done"}


def test_poison_reaches_what_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "POISON", True)
    cpu = torch.device("cpu")
    assert scratch.empty((3,), torch.bfloat16, cpu).isnan().all()
    assert (scratch.empty((3,), torch.uint8, cpu) == 0xA5).all() and (scratch.empty((3,), torch.int8, cpu) == -91).all()


# --- on a GPU only ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@each_op
def test_as_many_launches_on_the_gpu_as_the_spec_says(spec: OpSpec) -> None:
    inputs = small_case(spec)
    spec.run(copied(inputs))  # compiles
    again = copied(inputs)
    torch.cuda.synchronize()
    names = {kernel.fn.__name__ for kernel in spec.kernels}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        spec.run(again)
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = [name for name in launched if name.removesuffix(".kd") in names]
    assert len(ours) == spec.launches, launched


@pytest.mark.gpu
@each_op
def test_is_captured_in_a_cuda_graph_and_replayed_with_other_inputs(spec: OpSpec) -> None:
    """Proves that nothing waits for the device, and that nothing about the values is frozen at capture."""
    inputs = small_case(spec)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        spec.run(copied(inputs))
        static = copied(inputs)
        spec.run(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dict(checks.leaves(spec.run(static)))
    for scale in (1.0, 0.5):
        fresh = copied(inputs)
        for (_, slot), (_, value) in zip(checks.leaves(static), checks.leaves(fresh)):
            if value.is_floating_point():
                value.mul_(scale)
            slot.copy_(value)
        graph.replay()
        expected = dict(checks.leaves(spec.run(fresh)))
        torch.cuda.synchronize()
        for name, tensor in expected.items():
            assert checks.same_bits(captured[name], tensor), name


@pytest.mark.gpu
@each_op
def test_runs_on_a_device_that_is_not_the_current_one(spec: OpSpec) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = next(case for case in spec.cases if case.name == "1000 elements")
    with torch.cuda.device(0):
        checks.check_case(spec, case, case.dtypes[0], torch.device("cuda", 1))


LARGE = 2_200_000_000


@pytest.mark.gpu
@pytest.mark.slow
@on_flat_buffers
def test_offsets_beyond_two_to_the_31(spec: OpSpec) -> None:
    if torch.cuda.mem_get_info()[0] < 16 * LARGE:
        pytest.skip("needs about 35 GB of free GPU memory")
    checks.check_large(spec, LARGE, DEVICE)
