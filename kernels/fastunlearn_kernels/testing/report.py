"""Writes what ahead-of-time compilation says about every kernel into a table: `make kernels-report`.

Exit status 1 if a kernel breaks what its spec promises. Timings need a GPU, see benchmarks/.

Usage: `python -m fastunlearn_kernels.testing.report [--output kernels/REPORT.md] [--json FILE] [--workers 2]`
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from fastunlearn_kernels.testing import aot
from fastunlearn_kernels.testing.all_specs import ALL_SPECS
from fastunlearn_kernels.testing.common.spec import OpSpec

HEADER = f"""# What the compilers make of the kernels

Written by `make kernels-report` with Triton {triton.__version__}; do not edit. No GPU was used and no speed is claimed:
every kernel is compiled ahead of time for each target and its machine code is read.

A cell gives the registers of a thread and the widest load from global memory by one thread in bits. No cell has stack
or spills, unless it says so. The budget holds for NVIDIA's targets; AMD's register file is larger and the figure is
only reported. Where the spec promises vector loads, a load instruction of a warp brings 512 bytes: 128 bits a thread on
NVIDIA (`ld.global.v4.b32`), 64 on AMD, whose warps are twice as wide. Instructions are counted for {aot.COUNTED},
statically: all of the kernel, and per element those of the loop with 128-bit loads, or (marked *) of the whole kernel,
its last reduction included, where a program has no such loop. "Every size 1": all integer arguments are 1, which a
launch turns into constants; compiled once per kernel, to see that it does.
"""


def table_of_kernels(rows: Iterable[aot.Row]) -> list[str]:
    """One line per kernel, one column per target."""
    lines = [
        f"| op | variant | {' | '.join(aot.TARGETS)} | budget | vector loads | instructions | per element | verdict |",
        "|---" * (len(aot.TARGETS) + 7) + "|",
    ]
    grouped: dict[tuple[str, str, str], dict[str, aot.Row]] = {}
    for row in rows:
        grouped.setdefault((row.op, row.kernel, row.variant), {})[row.target] = row
    for (op, kernel, variant), by_target in grouped.items():
        counted = by_target[aot.COUNTED]
        star = "*" if counted.counted_in == "kernel" else ""
        per_element = f"{counted.per_element:.1f}{star}" if counted.counted_in else "-"
        name = f"`{op}`" if kernel == f"{op}_kernel" else f"`{op}`: `{kernel}`"
        failed = [f"{target}: {row.reason}" for target, row in by_target.items() if row.reason]
        cells = [
            name,
            variant,
            *[_cell(by_target.get(target)) for target in aot.TARGETS],
            str(counted.budget),
            "promised" if counted.vector_loads else "no",
            str(counted.instructions),
            per_element,
            f"FAILED on {len(failed)} ({failed[0]})" if failed else "ok",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(row: aot.Row | None) -> str:
    if row is None or not row.registers:
        return "-"
    extra = [f"stack {row.stack}"] if row.stack else []
    extra += [f"spills {row.spills}"] if row.spills else []
    return " ".join([str(row.registers), f"/ {row.load_bits}", *extra])


def table_of_traffic(specs: Sequence[OpSpec], numel: int = 1 << 16) -> list[str]:
    """Bytes that a call has to move per element, and its launches, from the specs."""
    cpu = torch.device("cpu")
    lines = ["| op | bytes per element, bf16 | bytes per element, fp32 | launches |", "|---|---|---|---|"]
    for spec in specs:
        inputs = [spec.bench(n, dtype, cpu) for dtype in (torch.bfloat16, torch.float32) for n in (numel, 2 * numel)]
        moved = [spec.bytes_moved(i) for i in inputs]
        # By the difference, so that an op whose traffic does not grow with the elements says 0.
        counts = [(moved[1] - moved[0]) / numel, (moved[3] - moved[2]) / numel]
        lines.append(f"| `{spec.name}` | {counts[0]:.2f} | {counts[1]:.2f} | {spec.launches} |")
    return lines


def markdown(rows: Sequence[aot.Row], specs: Sequence[OpSpec] = ALL_SPECS) -> str:
    failed = sum(not row.ok for row in rows)
    verdict = f"{len(rows)} compilations, {failed or 'none'} failed."
    traffic = "Bytes that have to move if each operand is touched once, and launches of a call, in the benchmark:"
    parts = [HEADER, verdict, "", *table_of_kernels(rows), "", traffic, "", *table_of_traffic(specs), ""]
    return "\n".join(parts)


class _Progress:
    """One short line on stderr per op."""

    def __init__(self) -> None:
        self.op = ""

    def __call__(self, row: aot.Row) -> None:
        if row.op != self.op:
            self.op = row.op
            print(f"compiling {row.op}", file=sys.stderr, flush=True)
        if not row.ok:
            print(f"FAILED {row.op}, {row.variant}, {row.target}: {row.reason}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastunlearn_kernels.testing.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, help="write the tables here, as Markdown (default: standard output)")
    parser.add_argument("--json", type=Path, help="write all rows here, as JSON")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes")
    options = parser.parse_args(arguments)
    try:
        rows = aot.compile_all(workers=options.workers, progress=_Progress())
    except RuntimeError as error:
        parser.error(str(error))
    text = markdown(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
