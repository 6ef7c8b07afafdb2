"""Other processes: those that started this one as a rank, and handles by which their end is noticed."""

from __future__ import annotations

import os
import socket
from pathlib import Path

LAUNCHERS = ("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run")


def launchers() -> list[int]:
    """Numbers of the processes that started this one as a rank; none where a person or a script did.

    DeepSpeed has two, of which the upper one dies of a signal without a word to the lower.
    """
    if "RANK" not in os.environ:
        return []
    found = [os.getppid()]
    while _is_launcher(parent := _parent(found[-1])):
        found.append(parent)
    return [pid for pid in found if pid > 1]


def open_process(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where the system has none, or the process."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None


def identity() -> tuple[str, int, int]:
    """(host, namespace, number) of this process."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return socket.gethostname(), namespace, os.getpid()


def _is_launcher(pid: int) -> bool:
    """Whether an interpreter runs one of the known programs or modules there; a shell whose line names one is none."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")[:4]
    except OSError:
        return False
    return Path(words[0]).name.startswith("python") and any(Path(word).name in LAUNCHERS for word in words[1:])


def _parent(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(status.rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0
