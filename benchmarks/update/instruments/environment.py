"""Where and with what a row was measured: GPU, driver, versions, commit, so that rows of several runs can share a file.

``machine`` does not touch the GPU: a benchmark's parent must not.
"""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("torch", "triton", "diffusers", "deepspeed", "bitsandbytes", "xformers")


def machine() -> dict[str, Any]:
    """GPU and driver, without CUDA; the commit, and whether the tree differs from it."""
    gpu, driver = "cpu", ""
    if shutil.which("nvidia-smi"):
        line = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
        gpu, _, driver = (part.strip() for part in (line.splitlines() or ["cpu"])[0].partition(","))
    elif Path("/proc/driver/nvidia/version").exists():
        gpu = "a GPU that nvidia-smi is not there to name"
    return {
        "gpu": gpu or "cpu",
        "driver": driver,
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD") or "?",
        "changed": bool(_output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")),
    }


def device_environment(device: Any) -> dict[str, Any]:
    """What the worker sees: the device, its memory, versions."""
    import torch

    found: dict[str, Any] = {
        "device": "cpu", "versions": {"python": platform.python_version()} | _versions(),
        "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "device_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
