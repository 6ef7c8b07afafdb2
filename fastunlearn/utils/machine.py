"""What this machine has: versions of libraries, memory of the host."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "fastunlearn", "torch", "diffusers", "transformers", "safetensors", "deepspeed", "bitsandbytes", "triton",
    "xformers",
)  # fmt: skip


def package_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Of Python, and of the packages that a run depends on and that are here."""
    found = {name: package_version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | {name: number for name, number in found.items() if number}


def host_memory_bytes(table: Path = Path("/proc/meminfo")) -> dict[str, int]:
    """What the system says, such as "MemAvailable", what it could give without swapping; empty where it says none."""
    try:
        lines = table.read_text(encoding="ascii").splitlines()
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
    except (OSError, ValueError, IndexError):
        return {}
