"""Starts a worker under DeepSpeed's launcher, as a user starts a training. Not a test itself."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

WORKERS = Path(__file__).resolve().parents[1] / "workers"


def launch(worker: Path, folder: Path, *what: str, world: int) -> str:
    """Run ``worker`` on this many ranks and return what it printed; each launch has a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world), "--master_port", str(port)]
    command += [str(worker), str(folder), *what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
