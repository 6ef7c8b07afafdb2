"""What every op is held to, case by case, from its spec alone. Shared by the tests, the mutations and the benchmarks.

Needs torch and the kernel package only, no pytest. As a script it checks ops and prints what fails, one line a failure:

    TRITON_INTERPRET=1 python tests/support/kernel_checks.py [--quick] [--case NAME] [--json FILE] [OP ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import quick_interpreter
import torch
from torch import Tensor

from fastunlearn_kernels.common import backend, scratch
from fastunlearn_kernels.common.tensor_lists import CHUNK
from fastunlearn_kernels.gradients.segments import Segments
from fastunlearn_kernels.gradients.surgery_coefficients import SurgeryPlan
from fastunlearn_kernels.quantize.blockwise_quantize import blockwise_quantize
from fastunlearn_kernels.testing.common.gradient_cases import flat_segments
from fastunlearn_kernels.testing.common.spec import SHORT, Case, Inputs, OpSpec, Outputs, copied

if backend.INTERPRETED:
    quick_interpreter.install()

EPS_FP32 = torch.finfo(torch.float32).eps
# Elements before and behind what a kernel may touch. Larger than any tile, so that a missing mask hits these.
GUARD = 8192


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def case_inputs(spec: OpSpec, case: Case, dtype: torch.dtype, on: torch.device) -> Inputs:
    """The same numbers each time."""
    draw = torch.Generator().manual_seed(zlib.crc32(f"{spec.name}, {case.name}, {dtype}".encode()))
    return case.make(draw, dtype, on)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in inputs or outputs with a name, lists and tuples included."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}[{i}]")


def storage_bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.numel() == 0:
        return True
    dense = [torch.empty_like(t, memory_format=torch.contiguous_format).copy_(t) for t in (a, b)]
    return torch.equal(*[t.view(-1).view(torch.uint8) for t in dense])


# --- memory that notices stray writes ---------------------------------------------------------------------------------


def in_guarded_memory(inputs: Inputs) -> Inputs:
    """A copy whose every tensor lies in a buffer of NaN (integers: 93), with the same strides and alignment.

    A load without a mask brings in NaN, a store without one changes the buffer.
    """
    seen: dict[int, Any] = {}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if isinstance(value, tuple):
            items = [moved(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if not isinstance(value, Tensor) or value.numel() == 0:
            return value
        if id(value) not in seen:
            seen[id(value)] = _guarded_copy(value)
        return seen[id(value)]

    return {name: moved(value) for name, value in inputs.items()}


def _guarded_copy(tensor: Tensor) -> Tensor:
    shift = tensor.data_ptr() % 16 // tensor.element_size()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    fill = float("nan") if tensor.is_floating_point() else tensor.dtype == torch.bool or 93
    buffer = torch.full((extent + shift + 2 * GUARD,), fill, dtype=tensor.dtype, device=tensor.device)
    copy = buffer[GUARD + shift :].as_strided(tensor.shape, tensor.stride())
    copy.copy_(tensor.detach())
    return copy.requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def guarded_scratch() -> Iterator[None]:
    """What `scratch.empty` hands out is poisoned and lies between guards; a write into one raises AssertionError."""
    plain, handed_out = scratch.empty, []

    def empty(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        numel = math.prod(shape)
        buffer = plain((numel + 2 * GUARD,), dtype, device)
        handed_out.append((buffer, numel, buffer[:GUARD].clone()))
        return buffer[GUARD : GUARD + numel].view(tuple(shape))

    scratch.empty, poison, scratch.POISON = empty, scratch.POISON, True
    try:
        yield
    finally:
        scratch.empty, scratch.POISON = plain, poison
    for buffer, numel, guard in handed_out:
        if not (same_bits(buffer[:GUARD], guard) and same_bits(buffer[GUARD + numel :], guard)):
            raise AssertionError(f"something is written outside of an output or partial sum of {numel} elements")


# --- running a case ---------------------------------------------------------------------------------------------------


def outputs_of(spec: OpSpec, inputs: Inputs, eager: bool = False) -> Outputs:
    """Outputs by name, and the gradients as `grad of NAME`, all detached, for a cotangent that is not one."""
    wanted = {}
    for name in spec.gradients:
        for path, tensor in leaves(inputs.get(name), name):
            if tensor.is_floating_point():
                wanted[path] = tensor.requires_grad_()
    out = (spec.eager if eager else spec.run)(inputs)
    result = {name: tensor.detach() for name, tensor in leaves(out)}
    if wanted and not (eager and spec.of_gradient not in out):
        differentiable = out[spec.of_gradient]
        cotangent = cotangent_of(differentiable)
        grads = torch.autograd.grad(differentiable, list(wanted.values()), cotangent, allow_unused=True)
        result |= {f"grad of {name}": g for name, g in zip(wanted, grads) if g is not None}
    for tensor in wanted.values():
        tensor.requires_grad_(False)
    return result


def oracle_of(spec: OpSpec, inputs: Inputs) -> Outputs:
    with backend.force("reference"):
        return outputs_of(spec, copied(inputs, torch.float64))


def eager_of(spec: OpSpec, inputs: Inputs) -> Outputs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return outputs_of(spec, copied(inputs), eager=True)


def check_case(spec: OpSpec, case: Case, dtype: torch.dtype, on: torch.device, name: str = "triton") -> None:
    """Raises AssertionError unless one backend is right, writes only what it may, and repeats itself bit for bit."""
    inputs = case_inputs(spec, case, dtype, on)
    oracle, eager = oracle_of(spec, inputs), eager_of(spec, inputs)
    runs = []
    for _ in range(2):
        mine = in_guarded_memory(inputs)
        before = {path: (t, storage_bytes(t).clone()) for path, t in leaves(mine)}
        with backend.force(name), guarded_scratch():
            runs.append(outputs_of(spec, mine))
        check_memory(spec, before)
        runs[-1] = {path: tensor.clone() for path, tensor in runs[-1].items()}
    if spec.compare is not None:
        spec.compare(runs[0], oracle, eager, inputs)
    else:
        check_values(runs[0], oracle, eager)
    for path, first in runs[0].items():
        assert same_bits(first, runs[1][path]), f"{path}: two runs differ"


def check_derivative(spec: OpSpec, case: Case, on: torch.device) -> None:
    """Raises AssertionError unless the gradients are the derivative, by central differences of the reference in fp64.

    `check_case` compares the gradients of two runs of the same backward; this is what says that it is the right one.
    """
    inputs = copied(case_inputs(spec, case, case.dtypes[0], on), torch.float64)
    paths = [path for name in spec.gradients for path, t in leaves(inputs.get(name), name) if t.is_floating_point()]
    with backend.force("reference"):
        found = outputs_of(spec, inputs)
        if not found[spec.of_gradient].isfinite().all() or not found[spec.of_gradient].numel():
            return
        for path in paths:
            tensor = dict(leaves(inputs))[path]
            if not tensor.isfinite().all():
                continue
            draw = torch.Generator().manual_seed(2)
            step = 1e-6 * torch.randn(tensor.shape, generator=draw, dtype=torch.float64).to(on) * (1 + _largest(tensor))
            ends = []
            for sign in (1, -1):
                tensor.add_(step, alpha=sign)
                out = spec.run(inputs)[spec.of_gradient]
                ends.append((out * cotangent_of(out)).sum().item())
                tensor.sub_(step, alpha=sign)
            gradient = found[f"grad of {path}"]
            along = (gradient * step).sum().item()
            scale = 2 * (gradient * step).abs().sum().item() + abs(ends[0]) * 1e-9
            assert abs(ends[0] - ends[1] - 2 * along) <= 1e-5 * scale, (
                f"grad of {path}: along a direction {2 * along:.6g}, by differences {ends[0] - ends[1]:.6g}"
            )


def cotangent_of(out: Tensor) -> Tensor:
    """Not one, so that a backward that ignores it is noticed; the same for every dtype."""
    draw = torch.Generator().manual_seed(1)
    return (0.4 + torch.rand(out.shape, generator=draw, dtype=torch.float32)).to(out)


def check_values(ours: Outputs, oracle: Outputs, eager: Outputs) -> None:
    """The generic rule: at most twice the error of eager in the same dtype, plus the rounding of the output."""
    missing = set(oracle) ^ set(ours)
    assert not missing, f"outputs of one only: {sorted(missing)}"
    for path, exact in oracle.items():
        mine, theirs = ours[path], eager.get(path)
        assert mine.shape == exact.shape, f"{path}: shape {tuple(mine.shape)}, the oracle's is {tuple(exact.shape)}"
        if not exact.is_floating_point():
            assert torch.equal(mine, exact), f"{path}: integers differ"
            continue
        if exact.numel() == 0:
            continue
        expected = exact.to(mine.dtype).double()
        expected = torch.where(expected.isfinite(), exact.double(), expected)
        finite = expected.isfinite()
        other = torch.nan_to_num(expected[~finite], 12345.0)
        assert torch.equal(torch.nan_to_num(mine.double()[~finite], 12345.0), other), f"{path}: NaN or Inf differ"
        error = _largest(mine.double()[finite] - expected[finite])
        allowed = (torch.finfo(mine.dtype).eps + 8 * EPS_FP32) * _largest(expected[finite])
        if theirs is not None and theirs.shape == exact.shape and theirs[finite].isfinite().all():
            allowed += 2 * _largest(theirs.double()[finite] - expected[finite])
        assert error <= allowed, f"{path}: error {error:.3g}, allowed {allowed:.3g}"


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def written(spec: OpSpec) -> set[str]:
    """Names of the op's arguments that its schema says are written in place."""
    schema = getattr(torch.ops.fastunlearn, spec.name).default._schema
    return {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}


def check_memory(spec: OpSpec, before: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Inputs keep every bit, unless the schema says that they are written; and so do the buffers around all of them."""
    may_change = written(spec)
    for path, (tensor, bits) in before.items():
        after = storage_bytes(tensor)
        if torch.equal(after, bits):
            continue
        name = path.replace("[", ".").split(".")[0]
        assert name in may_change, f"input {path} is modified"
        with torch.no_grad():
            changed = tensor.clone()
            tensor.zero_()
            restored = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(bits.untyped_storage())
            restored.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()
            assert torch.equal(storage_bytes(tensor), bits), f"something is written beside input {path}"
            tensor.copy_(changed)


@contextlib.contextmanager
def counted_launches() -> Iterator[list[str]]:
    """Names of the kernels that the interpreter runs inside the block."""
    from triton.runtime import interpreter

    names: list[str] = []
    plain = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return plain(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = call
    try:
        yield names
    finally:
        interpreter.GridExecutor.__call__ = plain


def check_large(spec: OpSpec, numel: int, on: torch.device) -> None:
    """Raises AssertionError unless 4096 elements near the end of a tensor of `numel` come out as they do alone."""
    size, at = 4096, (numel - 8192) // CHUNK * CHUNK
    alone = _flat_inputs(spec.name, size, on)
    embedded = {name: _embedded(value, size, at, numel) for name, value in alone.items()}
    if "segments" in alone:
        embedded["segments"] = Segments(((0, at, at + size, 0),), 1)
    with backend.force("triton"):
        expected, got = dict(leaves(spec.run(alone))), dict(leaves(spec.run(embedded)))
    for path, tensor in expected.items():
        found = got[path]
        if found.shape != tensor.shape:
            first = at * tensor.numel() // size
            found = found.view(-1)[first : first + tensor.numel()]
        assert same_bits(found, tensor), path


def _embedded(value: Any, size: int, at: int, numel: int) -> Any:
    """The same with each tensor of `size` elements, or of a scale per 256 of them, inside of one for `numel`."""
    if isinstance(value, (list, tuple)) and not isinstance(value, SurgeryPlan):
        items = [_embedded(item, size, at, numel) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if not isinstance(value, Tensor) or value.numel() not in (size, size // 256):
        return value
    first = at * value.numel() // size
    large = torch.zeros(numel * value.numel() // size, dtype=value.dtype, device=value.device)
    large[first : first + value.numel()] = value
    return large


def _flat_inputs(name: str, size: int, on: torch.device) -> Inputs:
    """One flat tensor of each operand of a parameter-space op."""
    draw = torch.Generator().manual_seed(3)

    def values(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        return [torch.randn(size, generator=draw).to(dtype).to(on)]

    kept = blockwise_quantize(values(torch.float32))
    if name == "blockwise_quantize":
        return {"tensors": values()}
    if name == "blockwise_dequantize":
        return {"codes": kept.codes, "absmax": kept.absmax, "like": values()[0][:0]}
    inputs: Inputs = {"retain": kept, "segments": flat_segments([0, size])}
    if name != "surgery_dots":
        inputs["plan"] = SurgeryPlan(*[torch.tensor(x, device=on) for x in ([-0.3], 0.7, 0.0, 1.0)])
    if name != "adamw8bit_step":
        return inputs | {"unlearn": values()}
    codes = [[torch.randint(0, 256, (size,), dtype=torch.uint8, generator=draw).to(on)] for _ in range(2)]
    scales = [[torch.rand(size // 256, generator=draw).to(on)] for _ in range(2)]
    inputs |= {"params": values(), "grads": values(), "step": 2, "lr": 1e-2, "stochastic_rounding": False}
    return inputs | dict(zip(("state1", "state2", "absmax1", "absmax2"), codes + scales))


def all_cases(spec: OpSpec) -> list[tuple[Case, torch.dtype]]:
    return [(case, dtype) for case in spec.cases for dtype in case.dtypes]


def failures(
    spec: OpSpec, on: torch.device, quick: bool = False, only_case: str = "", first_case: str = ""
) -> list[str]:
    """One line for each case that fails; an exception is a failure like a wrong number.

    quick: each case in one dtype, up to the first failure. first_case: the name of the one to begin with.
    """
    found = []
    for case, dtype in sorted(all_cases(spec), key=lambda pair: pair[0].name != first_case):
        if only_case not in ("", case.name) or (quick and dtype != case.dtypes[0]):
            continue
        try:
            if spec.gradients and dtype == case.dtypes[0]:
                check_derivative(spec, case, on)
            check_case(spec, case, dtype, on)
        except Exception as error:
            where = f"{spec.name}, {case.name}, {SHORT.get(dtype, dtype)}"
            found.append(f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            if quick:
                break
    return found


def main() -> int:
    from fastunlearn_kernels.testing.all_specs import ALL_SPECS

    parser = argparse.ArgumentParser(description="check ops against their fp64 reference")
    parser.add_argument("ops", nargs="*", help="names; all if none is given")
    parser.add_argument("--json", type=Path, help="write {op: [failures]} here")
    parser.add_argument("--case", default="", help="only the case of this name, where an op has it")
    parser.add_argument("--quick", action="store_true", help="each case in one dtype, up to an op's first failure")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not backend.INTERPRETED:
        parser.error("no GPU: set TRITON_INTERPRET=1 to interpret the kernels")
    chosen = [spec for spec in ALL_SPECS if not options.ops or spec.name in options.ops]
    found = {spec.name: failures(spec, device(), options.quick, options.case) for spec in chosen}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for line in [line for lines in found.values() for line in lines]:
        print(line)
    return 1 if any(found.values()) or not found else 0


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.exit(main())
