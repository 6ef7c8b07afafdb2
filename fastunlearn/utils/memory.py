"""How much memory this process has used at most, and how much the machine has. What a run will need: `planning/`."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of allocated device memory on a GPU, peak resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def host_memory_bytes(field: str, table: Path = Path("/proc/meminfo")) -> int | None:
    """A line of the system's own table, such as "MemTotal" or "MemAvailable", which is what it could give without
    swapping; None where it does not say."""
    try:
        lines = table.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
