"""The benchmark of the kernels runs and its table is made, on one op at a small size; `make bench` does the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A pytest of its own: a worker of pytest-xdist would time nothing.
OURS = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OURS} | {"KERNEL_SIZES": "4096"}


def test_benchmark_and_table(tmp_path: Path) -> None:
    report, table = tmp_path / "benchmark.json", tmp_path / "kernels.md"
    command = [sys.executable, "-m", "pytest", "benchmarks/ops/test_kernels.py", "-p", "no:cacheprovider"]
    command += ["-k", "guided_step and not compiled", f"--benchmark-json={report}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    rows = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    assert {row["extra_info"]["provider"] for row in rows} == {"ours", "eager"}
    command = [sys.executable, "benchmarks/ops/kernel_table.py", str(report), "--output", str(table)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    text = table.read_text(encoding="utf-8")
    assert text.count("| `guided_step` | 4,096 |") == 2
    assert ("no statement about kernels" in text) == (rows[0]["extra_info"]["device"] == "cpu")


def test_an_op_that_is_wrong_gets_no_speed(tmp_path: Path) -> None:
    """The package is a copy whose guided_step is broken: the benchmark must fail with what the checks find."""
    from kernel_mutants import MUTANTS, build

    build(next(mutant for mutant in MUTANTS if mutant.op == "guided_step"), tmp_path / "copy")
    env = ENVIRONMENT | {"PYTHONPATH": str(tmp_path / "copy")}
    command = [sys.executable, "-m", "pytest", "benchmarks/ops/test_kernels.py", "-p", "no:cacheprovider"]
    command += ["-k", "guided_step and ours", "--tb=line"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 1 and "no speed for an op that is wrong: guided_step" in done.stdout, done.stdout[-3000:]
