"""The names that a run, of any registered export format, and what looks at it later, write in an output folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastunlearn.errors import UserError
from fastunlearn.export.formats.delta import FORMAT as DELTA
from fastunlearn.registry import FORMATS
from fastunlearn.utils.folders.lock import folder_lock
from fastunlearn.utils.folders.marker import MARKER, read_marker, record_files
from fastunlearn.utils.folders.replacing import put_in_place
from fastunlearn.utils.run_folder import (
    CARD,
    CHECKPOINT,
    CONFIG,
    CURVES_FOLDER,
    EVALUATION,
    LOCK,
    METRICS_FILE,
    PROGRESS_LOG,
    RELEARNING,
    SAMPLES,
    SURGERY_LOG,
    TRAIN_LOG,
    UNFINISHED,
    check_results,
    list_checkpoints,
)

if TYPE_CHECKING:
    from fastunlearn.config import Config

LATER_FILES = (EVALUATION, RELEARNING)


def run_files() -> list[str]:
    """What a run writes, files and folders."""
    weights = [known.path for known in FORMATS.values()]
    return [CONFIG, *weights, METRICS_FILE, TRAIN_LOG, PROGRESS_LOG, SURGERY_LOG, SAMPLES, CURVES_FOLDER, CARD]


def file_names(cfg: Config) -> list[str]:
    """The files of a run whose names are known before they are written."""
    weights = [name for chosen in cfg.export.formats for name in FORMATS[chosen].files]
    pictures = [f"{SAMPLES}/{name}.png" for name in ("before_after", "progress", "surgery")]
    return [CONFIG, *weights, DELTA.path, METRICS_FILE, TRAIN_LOG, PROGRESS_LOG, SURGERY_LOG, *pictures, CARD]


def run_traces(folder: Path) -> Iterator[Path]:
    """What runs have left in this folder, as its marker says."""
    marker = read_marker(folder)
    if marker is not None:
        yield from (folder / path for path in marker.paths() if (folder / path).exists())
        yield from list_checkpoints(folder)
        if read_marker(folder / UNFINISHED) is not None:
            yield folder / UNFINISHED


@contextmanager
def results_held(folder: Path) -> Iterator[None]:
    """Hold a finished run's folder while it is looked at and what was found is added.

    Raises:
        UserError: no run has finished there, another process holds it, or a link leads out of it.
    """
    check_results(folder)
    with folder_lock(folder, "--model"):
        put_in_place(folder)
        check_results(folder)
        link = next(links(folder), None)
        if link is not None:
            raise UserError(f"--model: {str(link)!r} is a link to another place, which would be written; remove it")
        yield


def note_later_files(folder: Path, *names: str) -> None:
    """Enter what is added to a run's results in its marker, if it has one.

    Raises:
        UserError: it cannot be written.
    """
    if read_marker(folder) is not None:
        record_files(folder, names)


def links(folder: Path) -> Iterator[Path]:
    """What a run would write, and is a link to somewhere else."""
    own = {*run_files(), *LATER_FILES, MARKER, LOCK, UNFINISHED}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() and (path.name in own or CHECKPOINT.fullmatch(path.name)):
            yield path
