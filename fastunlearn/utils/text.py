"""Text for people: sizes in bytes, the first line of an error, names of styles."""

from __future__ import annotations

GIB = 2**30
STYLE = " style"
"""How the name of a style ends."""


def size(count: int) -> str:
    """1.23 GiB, 12.3 MiB, or a dash for nothing."""
    if count == 0:
        return "-"
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.2f} MiB"


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error, for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def names_style(name: str) -> bool:
    """Whether this is how a style is called."""
    return name.lower().endswith(STYLE)


def without_style(name: str) -> str:
    """ "neon style" -> "neon"; any other name as it is."""
    return name.removesuffix(STYLE)
