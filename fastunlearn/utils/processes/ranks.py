"""The launcher of ``fastunlearn train --num_gpus N``: starts the ranks on this host, and ends them together.

A signal is handed on, and the ranks save their state. When one dies, the others, which would wait for it for ever, are
ended within seconds, and a line says which one it was and what it said last.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from fastunlearn.errors import UserError

GRACE_SECONDS = 5.0  # for the others' own words, once a rank has died
POLL_SECONDS = 0.05
WORDS = 3  # lines


class Rank:
    """One process, and the end of what it writes to stderr."""

    def __init__(self, number: int, command: Sequence[str], place: Mapping[str, str]) -> None:
        self.number = number
        self._said: deque[str] = deque(maxlen=WORDS)
        # The first one draws the progress bar, which needs the terminal itself.
        self.process = subprocess.Popen(
            command,
            env=os.environ | place,
            stderr=None if number == 0 else subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            sys.stderr.write(line)
            if line.strip():
                self._said.append(line.strip())

    def last_words(self) -> str:
        """How it ended, and its last line."""
        self._reader.join(timeout=1)
        status = self.process.returncode
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"rank {self.number} (process {self.process.pid}) {how}" + (f": {self._said[-1]}" if self._said else "")


def run_ranks(count: int, command: Sequence[str]) -> int:
    """Run ``command`` as ``count`` ranks until all have ended; their exit status: the first that is not 0."""
    heard: list[int] = []

    def hand_on(signum: int, frame: Any) -> None:
        heard.append(signum)
        for rank in ranks:
            with suppress(ProcessLookupError):
                rank.process.send_signal(signum)

    ranks: list[Rank] = []
    old = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        port = free_port()
        for number in range(count):
            ranks.append(Rank(number, command, place(number, count, port)))
        return _until_all_end(ranks, heard)
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.wait()
        for number, handler in old.items():
            signal.signal(number, handler)


def _until_all_end(ranks: Sequence[Rank], heard: Sequence[int]) -> int:
    failed: Rank | None = None
    deadline = 0.0
    while None in [rank.process.poll() for rank in ranks]:  # all are asked: their status is known only then
        bad = next((rank for rank in ranks if rank.process.returncode not in (None, 0)), None)
        if bad is not None and failed is None:
            failed, deadline = bad, time.monotonic() + GRACE_SECONDS
        if failed is not None and time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    failed = failed or next((rank for rank in ranks if rank.process.returncode not in (None, 0)), None)
    if failed is None:
        return 0
    if heard:
        return 128 + heard[0]
    if failed.process.returncode not in (2, 3):  # of these the run itself has spoken, in one line
        print(f"error: {failed.last_words()}", file=sys.stderr)
    status = failed.process.returncode
    return status if status > 0 else 128 - status


def place(rank: int, count: int, port: int) -> dict[str, str]:
    """What a rank reads of its place among the others."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "LOCAL_SIZE": count}
    return {name: str(value) for name, value in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def check_port() -> None:
    """On the first of several ranks, whether they can meet. torchrun listens there itself, before its ranks start.

    Raises:
        UserError: the port is taken, or none.
    """
    port = os.environ.get("MASTER_PORT", "")
    if os.environ.get("RANK") != "0" or not port or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(
                f"MASTER_PORT: {port!r} cannot be used on this host ({getattr(error, 'strerror', None) or error}), "
                "perhaps another run has it; choose one: deepspeed --master_port N, or let "
                "`fastunlearn train --num_gpus N` do so"
            ) from None


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
