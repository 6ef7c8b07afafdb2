"""Runs `fastunlearn` with something that is not in the package: one file, and one line in a registry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import forked

WORKER = Path(__file__).resolve().parents[1] / "workers" / "extension_worker.py"


@dataclass(frozen=True)
class Extension:
    """A file, and the line that makes it known."""

    registry: str
    """The registry's name in `fastunlearn/registry.py`, such as "METHODS"."""
    name: str
    """What a user writes."""
    attribute: str
    """What the entry points to in the file."""
    source: str
    """The text of the file."""


@dataclass(frozen=True)
class Done:
    """What one command line left."""

    status: int
    out: str
    err: str


def run_with(extensions: Sequence[Extension], folder: Path, *commands: Sequence[str]) -> list[Done]:
    """Run command lines (without the leading `fastunlearn`) in turn, in a process that has the extensions."""
    entries = []
    for extension in extensions:
        module = f"toy_{extension.name}"
        (folder / f"{module}.py").write_text(extension.source, encoding="utf-8")
        entries.append([extension.registry, extension.name, f"{module}:{extension.attribute}"])
    asked = {"entries": entries, "commands": [list(words) for words in commands]}
    (folder / "extension.json").write_text(json.dumps(asked), encoding="utf-8")
    done = forked.run([str(WORKER), str(folder)], folder, anew="fastunlearn")
    assert done.returncode == 0, done.stderr[-3000:]
    return [Done(**one) for one in json.loads((folder / "done.json").read_text(encoding="utf-8"))]
