"""Tables of the benchmarks as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """One line of titles, the rule below it, then the rows; a bar inside a cell is escaped."""
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
