"""The files of an output folder: their names, and what of a run is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fastunlearn.errors import UserError

TRAIN_LOG = "train_log.jsonl"
SURGERY_LOG = "surgery_log.jsonl"
# What a run writes; any of these says that a run was started there.
RUN_FILES = ("config.toml", "unet", "delta.safetensors", "metrics.json", TRAIN_LOG, "samples", "README.md")
LATER_FILES = ("evaluation.json", "relearn.json", "logs", SURGERY_LOG)
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints ``checkpoint-N`` of a run, oldest first."""
    found = [(int(match[1]), entry) for entry in Path(folder).glob("*") if (match := CHECKPOINT.fullmatch(entry.name))]
    return [entry for _, entry in sorted(found) if entry.is_dir()]


def run_traces(folder: Path) -> Iterator[Path]:
    """Whatever says that a run was started in this folder."""
    yield from (folder / name for name in RUN_FILES if (folder / name).exists())
    yield from list_checkpoints(folder)


def check_results(folder: Path) -> None:
    """Refuse a folder in which no run has finished.

    Raises:
        UserError: names what is missing.
    """
    for needed in ("config.toml", "unet/config.json"):
        if not (folder / needed).is_file():
            raise UserError(
                f"--model: {str(folder)!r} has no {needed}; expected the output_dir of a finished `fastunlearn train`"
            )
