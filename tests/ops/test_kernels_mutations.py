"""The checks notice broken kernels: each mutant of kernel_mutants.py must fail those of its op, the intact one none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from kernel_mutants import BROKEN, MUTANTS, Mutant

from fastunlearn_kernels.testing.all_specs import ALL_SPECS

SCRIPT = Path(__file__).resolve().parents[1] / "mutation" / "kernel_mutants.py"


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """All mutants at once: they share one start of torch."""
    folder = tmp_path_factory.mktemp("mutants")
    report = folder / "verdicts.json"
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--folder", str(folder / "copies"), "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(report.read_text(encoding="utf-8"))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.op}-{m.what}".replace(" ", "_"))
def test_a_broken_kernel_is_noticed(mutant: Mutant, verdicts: dict[str, list[str]]) -> None:
    found = verdicts[f"{mutant.op}: {mutant.what}"]
    assert found, "every check passes although the kernel is broken"
    assert not found[0].startswith(BROKEN), found[0]
    assert "AssertionError" in found[0] or "ended with status" in found[0], f"it does not run: {found[0]}"


@pytest.mark.parametrize("op", sorted({mutant.op for mutant in MUTANTS}))
def test_the_intact_copy_passes(op: str, verdicts: dict[str, list[str]]) -> None:
    assert not verdicts[f"intact {op}"]


def test_every_op_has_mutants() -> None:
    count = Counter(mutant.op for mutant in MUTANTS)
    assert all(count[spec.name] >= 3 for spec in ALL_SPECS) and len(MUTANTS) >= 30
