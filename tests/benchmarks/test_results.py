"""What RESULTS.md and the older tables name is there: the programs take their commands, and their files of rows exist.
Nothing is run."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from update.rows import config_of, parse_sweep

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "benchmarks" / "RESULTS.md", ROOT / "benchmarks" / "results" / "first_edition" / "README.md"]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [block for text in TEXTS.values() for block in re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
PROGRAM = re.compile(r"python (?:benchmarks|\.\.)/((?:quality|update)/\w+)\.py (.*)")
COMMANDS = [(found[1].replace("/", "."), found[2]) for line in LINES if (found := PROGRAM.search(line))]


@pytest.mark.parametrize(
    ("program", "said"), COMMANDS, ids=[f"{program}-{n}" for n, (program, _) in enumerate(COMMANDS)]
)
def test_a_command_of_the_results_is_understood(program: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, *shlex.split(said)])
    found = importlib.import_module(program).arguments()
    if program == "update.throughput":
        for row in parse_sweep(found.sweep, {"model": found.model}):
            config_of(row, False, short=True)


def test_the_results_have_commands_rows_and_pictures() -> None:
    assert len(COMMANDS) + sum("pytest " in line for line in LINES) == len(LINES) > 15
    for line in LINES:
        tests = line.split()[1:] if line.startswith("pytest") else []
        assert all((ROOT / name).is_file() for name in tests), line
    now, before = TEXTS.values()
    named = {PAGES[0].parent / name.rstrip(".") for name in re.findall(r"results/[\w./]+", now)}
    named |= {PAGES[1].parent / name for name in re.findall(r"(?<!output/)\b\w+\.(?:json|png)\b", before)}
    assert len(named) > 20
    assert not [file for file in named if not file.exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_contents_lead_to_headings(page: Path) -> None:
    headings = re.findall(r"^#+ (.*)$", TEXTS[page], re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\(#([^)]*)\)", TEXTS[page])
    assert len(links) > 8 and set(links) <= anchors


def test_there_are_contents() -> None:
    assert sum(len(re.findall(r"\(#([^)]*)\)", text)) for text in TEXTS.values()) > 15
