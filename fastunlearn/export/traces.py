"""What of a run, of any registered export format, is in an output folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastunlearn.registry import FORMATS
from fastunlearn.utils.run_folder import (
    CARD,
    CONFIG,
    EVALUATION,
    METRICS_FILE,
    RELEARNING,
    SAMPLES,
    SURGERY_LOG,
    TRAIN_LOG,
    list_checkpoints,
)

LATER_FILES = (EVALUATION, RELEARNING, "logs", SURGERY_LOG)


def run_files() -> list[str]:
    """What a run writes; any of these says that a run was started there."""
    weights = [known.path for known in FORMATS.values()]
    return [CONFIG, *weights, METRICS_FILE, TRAIN_LOG, SAMPLES, CARD]


def run_traces(folder: Path) -> Iterator[Path]:
    """Whatever says that a run was started in this folder."""
    yield from (folder / name for name in run_files() if (folder / name).exists())
    yield from list_checkpoints(folder)


def old_results(folder: Path) -> list[Path]:
    """What a run that may overwrite an older one removes first; not all of it need be there."""
    return [*(folder / name for name in (*run_files(), *LATER_FILES)), *list_checkpoints(folder)]
