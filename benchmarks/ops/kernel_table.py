"""Turns the JSON of pytest-benchmark into the Markdown table of the kernels.

Usage: `python benchmarks/ops/kernel_table.py output/benchmark.json [--output kernels.md]`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLUMNS = (
    "op", "elements", "dtype", "", "median", "quartiles", "against ours", "GB/s", "of copy", "launches", "peak extra",
)  # fmt: skip


def rows_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What test_kernels.py measured, flat; rows of other benchmarks are left out."""
    return [b["extra_info"] | b["stats"] for b in report["benchmarks"] if {"op", "provider"} <= b["extra_info"].keys()]


def table(report: dict[str, Any]) -> str:
    rows = rows_of(report)
    if not rows:
        return "No kernel was measured.\n"
    first, commit = rows[0], report.get("commit_info", {})
    dirty = " with changes" if commit.get("dirty") else ""
    on_cpu = first["device"] == "cpu"
    lines = [
        f"# Kernels on {first['device']}",
        "",
        f"torch {first['torch']}, triton {first['triton']}, driver {first['driver']}, "
        f"commit {str(commit.get('id', '?'))[:10]}{dirty}, {report.get('datetime', '?')[:10]}. "
        f"The device's own copy, measured in the same run: {first['copy_bandwidth'] / 1e9:.0f} GB/s.",
        "",
    ]
    if on_cpu:
        lines += ["**cpu, reference: no statement about kernels.** It tests the harness.", ""]
    lines += [
        "GB/s: bytes that have to move if each operand is touched once, over the median; the others move more. Losses "
        "are timed with their gradients. Launches: of everything in one call.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    ours = {(r["op"], r["numel"], r["dtype"]): r["median"] for r in rows if r["provider"] == "ours"}
    order = list(dict.fromkeys(r["op"] for r in rows))
    for row in sorted(rows, key=lambda r: (order.index(r["op"]), r["numel"])):
        lines.append("| " + " | ".join(_cells(row, ours.get((row["op"], row["numel"], row["dtype"])))) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], ours: float | None) -> list[str]:
    bandwidth = row["bytes_moved"] / row["median"]
    extra = row["peak_extra_bytes"]
    return [
        f"`{row['op']}`",
        f"{row['numel']:,}",
        row["dtype"],
        "reference" if row["device"] == "cpu" and row["provider"] == "ours" else row["provider"],
        _duration(row["median"]),
        f"{_duration(row['q1'])} - {_duration(row['q3'])}",
        f"{row['median'] / ours:.2f}x" if ours else "-",
        f"{bandwidth / 1e9:.1f}",
        f"{bandwidth / row['copy_bandwidth']:.0%}",
        "-" if row["launches"] is None else str(row["launches"]),
        "-" if extra is None else f"{extra / 2**20:,.1f} MiB",
    ]


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("report", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("--output", type=Path, help="Markdown file (default: standard output)")
    options = parser.parse_args()
    text = table(json.loads(options.report.read_text(encoding="utf-8")))
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
