"""What RESULTS.md names is there: its programs take its commands, and its files of rows exist. Nothing is run."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from update.rows import config_of, parse_sweep

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
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
    named = {name for name in re.findall(r"results/[\w.]+", TEXT) if not name.endswith("/")}
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / "benchmarks" / name.rstrip(".")).exists()]


def test_the_contents_lead_to_headings() -> None:
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\(#([^)]*)\)", TEXT)
    assert len(links) > 15 and set(links) <= anchors
