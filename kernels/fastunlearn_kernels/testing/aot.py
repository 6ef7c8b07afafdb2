"""Compiles every kernel ahead of time for GPUs that need not be there, and reads the machine code.

Registers and stack come from NVIDIA's cuobjdump, which Triton's wheel brings along, or from AMD's assembler text;
widths of loads from the PTX; instructions from the disassembly. Only a GPU can tell how fast it is.

Usage: `rows = compile_all(workers=2)` under `if __name__ == "__main__"`; report.py makes a table of them.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastunlearn_kernels.common import backend
from fastunlearn_kernels.testing.all_specs import ALL_SPECS
from fastunlearn_kernels.testing.common.spec import AotKernel, OpSpec

# Name -> (backend, architecture, threads of a warp).
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
COUNTED = "sm_90"  # the target whose instructions are counted
# What one load instruction of a warp has to bring where the spec promises vector loads: ld.global.v4.b32 for the 32
# threads of a warp; AMD's warps have 64, so that dwordx2 does the same.
WIDE_BYTES = 512


@dataclass(frozen=True)
class Row:
    """One kernel compiled for one target.

    Attributes:
        registers: per thread. stack: bytes per thread. spills: loads and stores of spilled registers.
        load_bits: the widest load from global memory by one thread, in bits.
        instructions: of the whole kernel, static; 0 where they are not counted.
        per_element: instructions that a thread issues for each element: those of the loop with the widest loads, or of
            the whole kernel where no loop has them (`counted_in` says which); 0.0 where it is not known.
        reason: why the row fails; empty if it does not.
    """

    op: str
    kernel: str
    variant: str
    target: str
    registers: int = 0
    budget: int = 0
    stack: int = 0
    spills: int = 0
    load_bits: int = 0
    vector_loads: bool = False
    instructions: int = 0
    per_element: float = 0.0
    counted_in: str = ""
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason


def compile_all(
    specs: Sequence[OpSpec] = ALL_SPECS, workers: int = 1, progress: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """Every kernel of the specs for every target, in that order; one that does not compile gives a row too.

    Raises RuntimeError if the kernels are interpreted in this process: then there is nothing to compile.
    """
    if backend.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, nothing can be compiled in this process; unset it and start again")
    jobs = [(spec.name, i, target, False) for spec in specs for i in range(len(spec.kernels)) for target in TARGETS] + [
        (spec.name, i, COUNTED, True) for spec in specs for i in _first_of_each(spec)
    ]
    rows = []
    # Fresh interpreters: a forked child of a process with threads, or with a CUDA context, is not safe.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(_compile_job, jobs, chunksize=4):
            progress(row)
            rows.append(row)
    return rows


def _first_of_each(spec: OpSpec) -> list[int]:
    """The first variant of each kernel that takes an integer."""
    first: dict[str, int] = {}
    for i, kernel in enumerate(spec.kernels):
        if _integers(kernel):
            first.setdefault(kernel.fn.__name__, i)
    return list(first.values())


def _integers(kernel: AotKernel) -> list[str]:
    return [name for name, kind in kernel.signature.items() if kind in ("i32", "i64") and name not in kernel.constexprs]


def _compile_job(job: tuple[str, int, str, bool]) -> Row:
    name, index, target, ones = job
    return compile_one(name, next(spec for spec in ALL_SPECS if spec.name == name).kernels[index], target, ones)


def compile_one(op: str, kernel: AotKernel, target: str, ones: bool = False) -> Row:
    """Compile one kernel for one target and judge the outcome.

    ones: every integer argument is 1. A launch turns such arguments into constants, which lack a tensor's methods, so
    that a kernel may compile for all sizes but this one. Vector loads are not expected then.
    """
    if ones:
        constants = dict(kernel.constexprs) | dict.fromkeys(_integers(kernel), 1)
        aligned = tuple(name for name in kernel.aligned if name not in constants)
        changes: dict[str, Any] = {"constexprs": constants, "aligned": aligned, "vector_loads": False, "elements": 0}
        kernel = replace(kernel, name=f"{kernel.name}, every size 1", **changes)
    names = {"op": op, "kernel": kernel.fn.__name__, "variant": kernel.name, "target": target}
    try:
        asm = _compile(kernel, target)
    except Exception as error:  # compilers raise what they like; the row has to say so and the others go on
        reason = f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[-200:]}"
        return Row(**names, budget=kernel.max_registers, reason=reason)
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    found = read(asm, kernel, target == COUNTED)
    row = Row(**names, budget=kernel.max_registers, vector_loads=kernel.vector_loads, **found)
    return replace(row, reason="; ".join(_complaints(row)))


def _complaints(row: Row) -> list[str]:
    complaints = []
    if row.target.startswith("sm_") and row.registers > row.budget:
        complaints.append(f"{row.registers} registers, budget {row.budget}")
    if row.registers == 0:
        complaints.append("the register count could not be read")
    if row.stack:
        complaints.append(f"{row.stack} bytes of stack")
    if row.spills:
        complaints.append(f"{row.spills} spills")
    if row.vector_loads and row.load_bits * TARGETS[row.target][2] < 8 * WIDE_BYTES:
        complaints.append(f"widest load {row.load_bits} bits")
    return complaints


def _compile(kernel: AotKernel, target: str) -> Any:
    order = list(kernel.fn.arg_names)
    types = dict(kernel.signature) | {name: "constexpr" for name in kernel.constexprs}
    unknown, missing = set(types) - set(order), set(order) - set(types)
    if unknown or missing:
        raise ValueError(f"signature has unknown arguments {sorted(unknown)}, lacks {sorted(missing)}")
    hints = {(order.index(name),): [["tt.divisibility", 16]] for name in kernel.aligned}
    source = ASTSource(
        fn=kernel.fn,
        signature={name: types[name] for name in order},
        constexprs=dict(kernel.constexprs),
        attrs=hints,
    )
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": kernel.num_warps})
    return compiled.asm


# --- reading the machine code -----------------------------------------------------------------------------------------


def _read_nvidia(asm: Any, kernel: AotKernel, count: bool) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = _tool("nvdisasm", "-c", "-ndf", file.name) if count else ""  # without data flow: quicker
    registers, stack, local = (_number(rf"\b{word}:(\d+)", usage) for word in ("REG", "STACK", "LOCAL"))
    found: dict[str, Any] = {"registers": registers, "stack": stack + local, "load_bits": _widest_load(asm["ptx"])}
    if count:
        code = _instructions(listing)
        found["instructions"] = len(code)
        found["spills"] = sum(name.startswith(("LDL", "STL")) for _, name, _ in code)
        found["per_element"], found["counted_in"] = _per_element(code, kernel)
    return found


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True, timeout=120).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _widest_load(ptx: str) -> int:
    """Bits of the widest ld.global of one thread."""
    loads = re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[a-z](\d+)\b", ptx)
    return max((int(count or 1) * int(bits) for count, bits in loads), default=0)


def _instructions(listing: str) -> list[tuple[int, str, int]]:
    """(address, mnemonic, target of a branch or -1) of each instruction of a listing by nvdisasm, NOP left out."""
    labels: dict[str, int] = {}
    waiting: list[str] = []
    parsed: list[tuple[int, str, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            waiting.append(label[1])
        elif code := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?\w+\s+)?([A-Z][\w.]*)(.*)", line):
            address = int(code[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            parsed.append((address, code[2], code[3]))
    out = []
    for address, name, rest in parsed:
        to = re.search(r"\.L_\w+", rest) if name.startswith("BRA") else None
        if name != "NOP":
            out.append((address, name, labels.get(to[0], -1) if to else -1))
    return out


def _per_element(code: list[tuple[int, str, int]], kernel: AotKernel) -> tuple[float, str]:
    """Instructions per element, and where they were counted: the loop whose body has 128-bit loads, else everything."""
    threads, tile = 32 * kernel.num_warps, kernel.elements
    if not tile:
        return 0.0, ""
    bodies = [[name for at, name, _ in code if begin <= at <= end] for end, _, begin in code if 0 <= begin < end]
    vector = [len(body) for body in bodies if any(name.startswith("LDG") and ".128" in name for name in body)]
    if vector:
        return min(vector) * threads / tile, "loop"
    return len(code) * threads / tile, "kernel"


def _read_amd(asm: Any, kernel: AotKernel, count: bool) -> dict[str, Any]:
    text = asm["amdgcn"]
    wide = {"x4": 128, "x3": 96, "x2": 64, "": 32}
    loads = re.findall(r"\b(?:global|buffer|flat)_load_dword(x\d)?\b", text)
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", text),
        "stack": _number(r"\.private_segment_fixed_size:\s*(\d+)", text) or _number(r"ScratchSize:\s*(\d+)", text),
        # Scalars are spilled into lanes of a vector register, which costs no memory access and shows in the registers.
        "spills": _number(r"\.vgpr_spill_count:\s*(\d+)", text),
        "load_bits": max((wide[suffix] for suffix in loads), default=16),
    }
