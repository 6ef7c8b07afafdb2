"""The files of an output folder that several packages read: logs, checkpoints, what a finished run leaves."""

from __future__ import annotations

import re
from pathlib import Path

from fastunlearn.errors import UserError

CONFIG, METRICS_FILE, CARD = "config.toml", "metrics.json", "README.md"
EVALUATION, RELEARNING, SAMPLES = "evaluation.json", "relearn.json", "samples"
TRAIN_LOG = "train_log.jsonl"
SURGERY_LOG = "surgery_log.jsonl"
PROGRESS_LOG = "progress.jsonl"  # one line for each probe
CURVES_FOLDER = "logs"  # of TensorBoard
UNET = "unet"  # the edited U-Net, a folder
UNFINISHED = "unfinished"  # where a run works that replaces the results of another
LOCK = ".fastunlearn.lock"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints ``checkpoint-N`` of a run, oldest first."""
    found = [(int(match[1]), entry) for entry in Path(folder).glob("*") if (match := CHECKPOINT.fullmatch(entry.name))]
    return [entry for _, entry in sorted(found) if entry.is_dir()]


def final_folder(work: str | Path) -> Path:
    """Where the results of a run end up that writes in ``work``."""
    return Path(work).parent if Path(work).name == UNFINISHED else Path(work)


def check_results(folder: Path) -> None:
    """Refuse a folder in which no run has finished.

    Raises:
        UserError: names what is missing.
    """
    for needed in (CONFIG, f"{UNET}/config.json"):
        if not (folder / needed).is_file():
            raise UserError(
                f"--model: {str(folder)!r} has no {needed}; expected the output_dir of a finished `fastunlearn train`"
            )
