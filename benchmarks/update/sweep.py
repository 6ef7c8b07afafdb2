"""Every row in a process of its own, its result on disk before the next one starts.

Skip what is done, start a worker (``worker.py``), wait for it within its time, write the file anew. A row that does not
fit, or that the trainer refuses, is a result with its reason. The table is made by ``report.py``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastunlearn.errors import UserError
from fastunlearn.utils.files import atomic_write_text
from update.figures import derived, known_before
from update.instruments.environment import machine
from update.rows import Row, identity, title

PROGRAM = Path(__file__).resolve().with_name("throughput.py")
FINAL = ("measured", "does not fit", "refused")
"""Rows that a second run of the sweep leaves alone; "failed" and "out of time" are tried again."""

OF_THIS_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""A worker is a world of its own."""


@dataclass(frozen=True)
class Limits:
    """How much is measured, and how long all of it may take."""

    updates: int = 5
    warmup: int = 2
    walk: int = 4
    """Sampler steps of the restart that is timed."""
    seconds: float = 0.0
    """No row starts where little of it is left, and the one at work is stopped; 0: no limit."""


def load_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run; none where there is no file.

    Raises:
        UserError: it is no such file.
    """
    if not file.is_file():
        return []
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))["rows"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--json: {file} holds no rows of this program; give another name") from None


def same_measurement(done: dict[str, Any], row: Row, here: dict[str, Any], limits: Limits) -> bool:
    """Whether ``done`` is this row, measured as now on this machine at this commit."""
    measured = done["machine"]
    return (
        identity(done["row"]) == identity(row)
        and (measured["gpu"], measured["commit"]) == (here["gpu"], here["commit"])
        and done["limits"] == [limits.updates, limits.warmup, limits.walk]
    )


def run_sweep(rows: Sequence[Row], file: Path, limits: Limits, command: str) -> tuple[list[dict[str, Any]], list[Row]]:
    """(all rows of the file, those for which there was no time)."""
    here, found, started = machine(), load_rows(file), time.monotonic()
    late: list[Row] = []
    longest = 0.0
    for row in rows:
        earlier = [done for done in found if same_measurement(done, row, here, limits)]
        if any(done["status"] in FINAL for done in earlier):
            print(f"done before: {title(row)}", file=sys.stderr)
            continue
        begun = time.monotonic()
        left = limits.seconds - (begun - started) if limits.seconds else None
        if left is not None and left <= longest / 2:  # it would hardly finish
            late.append(row)
            continue
        result = {
            "row": row, "machine": here, "command": command,
            "limits": [limits.updates, limits.warmup, limits.walk],
        } | one_row(row, limits, left, has_gpu=here["gpu"] != "cpu")  # fmt: skip
        longest = max(longest, time.monotonic() - begun)
        found = [done for done in found if done not in earlier] + [result]
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps({"rows": found}, indent=1) + "\n")
        print(f"{result['status']}: {title(row)}{_why(result)}", file=sys.stderr)
    return found, late


def _why(result: dict[str, Any]) -> str:
    return f" ({result['reason']})" if result.get("reason") else ""


def one_row(row: Row, limits: Limits, left: float | None, has_gpu: bool) -> dict[str, Any]:
    """Start a worker and work out the rest meanwhile; on a CPU before, so as not to disturb it."""
    try:
        known = known_before(row, has_gpu) if not has_gpu else None
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "row.json"
            worker = _start(row, limits, result, Path(folder) / "log.txt")
            if known is None:
                try:
                    known = known_before(row, has_gpu)
                except BaseException:
                    _stop(worker)
                    raise
            reason = _wait(worker, left)
            if reason is not None:
                return known | {"status": "out of time", "reason": reason}
            if not result.is_file():
                return known | _failure(worker.returncode, Path(folder) / "log.txt")
            measured = json.loads(result.read_text(encoding="utf-8"))
    except UserError as error:
        return {"status": "refused", "reason": str(error)}
    return known | measured | derived(row, known, measured)


def _start(row: Row, limits: Limits, result: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, *_launcher(int(row.get("ranks", "1")))]
    command += [str(PROGRAM), "--worker", json.dumps(row), "--result", str(result)]
    command += ["--updates", str(limits.updates), "--warmup", str(limits.warmup), "--walk", str(limits.walk)]
    with log.open("wb") as stream:
        env = {name: value for name, value in os.environ.items() if name not in OF_THIS_PROCESS}
        return subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, env=env)


def _launcher(ranks: int) -> list[str]:
    """DeepSpeed's, on a port of its own; nothing for one rank."""
    if ranks == 1:
        return []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "deepspeed.launcher.runner", "--no_local_rank"]
    return [*launcher, "--num_gpus", str(ranks), "--master_port", str(port)]


def _wait(worker: subprocess.Popen[bytes], left: float | None) -> str | None:
    try:
        worker.wait(left)
    except subprocess.TimeoutExpired:
        _stop(worker)
        return f"stopped after {left:.0f} s (--time-limit)"
    except BaseException:
        _stop(worker)
        raise
    return None


def _stop(worker: subprocess.Popen[bytes]) -> None:
    """The worker and what it started."""
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def _failure(code: int, log: Path) -> dict[str, Any]:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if code == -signal.SIGKILL:
        return {"status": "does not fit", "reason": "killed by the system, as where the host has no memory left"}
    tail = "\n".join(lines[-25:])
    return {"status": "failed", "reason": lines[-1][:300] if lines else f"exit status {code}", "log": tail}
