"""Text for people: sizes in bytes, the first line of an error."""

from __future__ import annotations

GIB = 2**30


def size(count: int) -> str:
    """1.23 GiB, 12.3 MiB, or a dash for nothing."""
    if count == 0:
        return "-"
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.2f} MiB"


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error, for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
