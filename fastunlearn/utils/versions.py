"""Versions of installed packages, for metrics, reports and bug reports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version(package: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
