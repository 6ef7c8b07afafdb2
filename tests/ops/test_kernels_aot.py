"""Every kernel compiles for GPUs that are not here, within its budget of registers, without stack, with wide loads.

All rows come from one run of the report in a process of its own, since this one may interpret the kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastunlearn_kernels.common import backend
from fastunlearn_kernels.testing import aot, report
from fastunlearn_kernels.testing.all_specs import ALL_SPECS
from fastunlearn_kernels.testing.common.spec import AotKernel, OpSpec

REPORT = Path(__file__).resolve().parents[2] / "kernels" / "REPORT.md"
KERNELS = [
    pytest.param(spec, kernel, id=f"{spec.name}-{kernel.fn.__name__}-{kernel.name}".replace(" ", "_"))
    for spec in ALL_SPECS
    for kernel in spec.kernels
]
DTYPES = ("fp32", "bf16", "fp16")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[aot.Row]:
    folder = tmp_path_factory.mktemp("aot")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastunlearn_kernels.testing.report"]
    command += ["--workers", str(min(4, os.cpu_count() or 1))]
    command += ["--json", str(folder / "rows.json"), "--output", str(folder / "REPORT.md")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1200)
    assert (folder / "rows.json").exists(), done.stderr[-2000:]
    found = [aot.Row(**row) for row in json.loads((folder / "rows.json").read_text(encoding="utf-8"))]
    assert done.returncode == (0 if all(row.ok for row in found) else 1)
    return found


@pytest.mark.parametrize(("spec", "kernel"), KERNELS)
def test_machine_code_keeps_what_the_spec_promises(spec: OpSpec, kernel: AotKernel, rows: list[aot.Row]) -> None:
    mine = [r for r in rows if (r.op, r.kernel, r.variant) == (spec.name, kernel.fn.__name__, kernel.name)]
    assert {row.target for row in mine} == set(aot.TARGETS)
    for row in mine:
        assert row.ok, f"{row.target}: {row.reason}"
        assert row.stack == 0 and row.spills == 0 and row.registers > 0
        if row.target.startswith("sm_"):
            assert row.registers <= kernel.max_registers
        if kernel.vector_loads:
            assert row.load_bits >= (128 if row.target.startswith("sm_") else 64)


def test_every_kernel_compiles_where_all_sizes_are_one(rows: list[aot.Row]) -> None:
    ones = [row for row in rows if row.variant.endswith("every size 1")]
    assert ones and not [f"{row.op}, {row.kernel}: {row.reason}" for row in ones if not row.ok]


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda spec: spec.name)
def test_each_dtype_is_compiled(spec: OpSpec) -> None:
    if spec.name == "surgery_coefficients":  # fp64 in, fp32 out, whatever the gradients are
        return
    names = " ".join(kernel.name for kernel in spec.kernels)
    assert all(dtype in names for dtype in DTYPES)


def test_some_kernels_promise_vector_loads() -> None:
    promising = {spec.name for spec in ALL_SPECS if any(kernel.vector_loads for kernel in spec.kernels)}
    assert promising == {spec.name for spec in ALL_SPECS} - {"surgery_coefficients"}


def test_the_report_in_the_repository_is_up_to_date(rows: list[aot.Row]) -> None:
    """By names and traffic, not by registers: another version of Triton may need one more."""
    text = REPORT.read_text(encoding="utf-8") if REPORT.exists() else ""
    lines = [line.split(" | ") for line in report.table_of_kernels(rows)[2:]]
    missing = [" ".join(line[:2]) for line in lines if " | ".join(line[:2]) + " |" not in text]
    missing += [line for line in report.table_of_traffic(ALL_SPECS)[2:] if line not in text]
    assert not missing, f"run make kernels-report; kernels/REPORT.md lacks {missing[:3]}"
    assert "FAILED" not in text


def test_a_process_that_interprets_refuses_politely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="unset it"):
        aot.compile_all()


def test_the_judgement_of_a_row() -> None:
    good = aot.Row("op", "kernel", "fp32", "sm_90", registers=40, budget=64, load_bits=128, vector_loads=True)
    assert not aot._complaints(good)
    for change in ({"registers": 65}, {"registers": 0}, {"stack": 8}, {"spills": 2}, {"load_bits": 64}):
        assert aot._complaints(aot.Row(**{**good.__dict__, **change}))
    assert aot._widest_load("ld.global.v4.b32 {a}; ld.global.cg.b64 x;") == 128
    assert aot._widest_load("@%p4 ld.global.L1::evict_first.v2.b32 { %r1 }") == 64


def test_a_loop_is_found_in_a_listing() -> None:
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
    .L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FFMA R0, R4, R4, R0 ;
        /*0030*/              @P0 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
        /*0050*/                   NOP ;
    """
    code = aot._instructions(listing)
    assert [name for _, name, _ in code] == ["MOV", "LDG.E.128", "FFMA", "BRA", "EXIT"]
    kernel = AotKernel("fp32", None, {}, {}, elements=1024)
    assert aot._per_element(code, kernel) == (3 * 128 / 1024, "loop")
