"""Runs a worker on several ranks. Not a test itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import forked

WORKERS = Path(__file__).resolve().parents[1] / "workers"
TIMEOUT = 1200


def launch(worker: Path, folder: Path, *what: str, world: int) -> str:
    """Run ``worker`` under DeepSpeed's launcher, as a user starts a training, and return what it printed."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world)]
    command += ["--master_port", str(free_port()), str(worker), str(folder), *what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_ranks(worker: Path, folder: Path, *what: str, world: int) -> None:
    """Run ``worker`` with the environment that the launcher would give each rank, forked: it starts at once."""
    port = free_port()
    printed = [folder / f"rank-{rank}.txt" for rank in range(world)]
    ranks = [
        forked.start([str(worker), str(folder), *what], out, out, env=os.environ | place(rank, world, port))
        for rank, out in enumerate(printed)
    ]
    deadline = time.monotonic() + TIMEOUT
    try:
        while any(rank.exitcode is None for rank in ranks):
            assert not any(rank.exitcode for rank in ranks) and time.monotonic() < deadline, tail(printed)
            time.sleep(0.02)
        assert not any(rank.exitcode for rank in ranks), tail(printed)
    finally:
        for rank in ranks:  # one that waits for another that has failed would wait for long
            rank.kill()


def place(rank: int, world: int, port: int) -> Mapping[str, str]:
    """The launcher's variables."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "LOCAL_SIZE": world}
    return {name: str(value) for name, value in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """Each launch has a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tail(printed: list[Path]) -> str:
    """The end of what each rank printed."""
    return "\n".join(path.read_text(encoding="utf-8")[-3000:] for path in printed if path.exists())
