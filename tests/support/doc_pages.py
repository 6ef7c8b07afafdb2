"""The pages of the documentation, cut into fenced blocks, and their shell blocks into commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "fastunlearn" / "minicanvas" / "README.md",
]
BLOCK = re.compile(r"(?:^<!-- needs: (?P<needs>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block. ``needs``: what the comment above it asks for, beside a checkout and a CPU."""

    page: str
    line: int
    language: str
    text: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell block, split into words."""

    block: Block
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.block} {' '.join(self.words[:3])}"


def blocks(language: str | None = None) -> list[Block]:
    """All blocks of all pages, or those of a language."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("language")) + 1
            name = page.relative_to(ROOT).as_posix()
            found.append(Block(name, line, match["language"], match["text"], match["needs"]))
    return [block for block in found if language in (None, block.language)]


def header_commands() -> Iterator[Command]:
    """The commands that the first comment of a configuration gives."""
    for file in sorted((ROOT / "configs").glob("*.toml")):
        name, header = file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8").partition("\n\n")[0]
        for number, line in enumerate(header.splitlines(), start=1):
            if line.startswith("#   "):
                block = Block(name, number, "bash", line, header)
                yield Command(block, tuple(shlex.split(line[1:], comments=True)))


def commands() -> Iterator[Command]:
    """Every command of every shell block: continued lines joined, comments dropped, ``&&`` taken apart."""
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = tuple(shlex.split(part, comments=True))
                if words:
                    yield Command(block, words)
