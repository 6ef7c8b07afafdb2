"""The output folder of a run: what may be filled, who may fill it, and where in it a run works.

Three things must never happen: that a model which is read is written over, that a file goes which no run of ours wrote,
and that two runs write the same folder.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args, get_type_hints

from pydantic import BaseModel

from fastunlearn.config import Config
from fastunlearn.errors import UserError, nearest
from fastunlearn.export.traces import links, run_traces
from fastunlearn.minicanvas import pipeline_path
from fastunlearn.schema.fields import PathStr
from fastunlearn.utils.folders.lock import folder_lock
from fastunlearn.utils.folders.marker import MARKER, read_marker
from fastunlearn.utils.folders.replacing import put_in_place, working_folder
from fastunlearn.utils.processes import stop
from fastunlearn.utils.run_folder import LOCK, UNFINISHED, list_checkpoints

MODEL = "model.pretrained_model_name_or_path"
NOT_READ = ("output_dir", "resume_from_checkpoint")
"""Fields that name a place and are no source of the run."""


@contextmanager
def claim(cfg: Config, is_main: bool) -> Iterator[Path]:
    """Hold the output folder as long as the block lasts; gives the folder in which the run works.

    ``is_main``: whether this rank holds it, for all.

    Raises:
        UserError: another process holds it, or it may not be filled.
    """
    if is_main:
        with folder_lock(Path(cfg.output_dir), "output_dir"):
            put_in_place(Path(cfg.output_dir))
            check_output_dir(cfg)
            yield working_place(cfg)
    else:
        yield working_place(cfg)


def working_place(cfg: Config) -> Path:
    """Where the run writes until it has succeeded."""
    resumes = cfg.resume_from_checkpoint is not None
    return working_folder(cfg.output_dir, replaces=cfg.overwrite_output_dir, resumes=resumes)


def check_output_dir(cfg: Config) -> None:
    """Refuse a folder that cannot be written, that has to do with what is read, or that holds what would be lost.

    Raises:
        UserError: nothing has been written.
    """
    folder = Path(cfg.output_dir)
    existing = existing_ancestor(folder)
    if not existing.is_dir():
        raise UserError(f"output_dir: {cfg.output_dir!r}: {str(existing)!r} is a file; give a folder")
    _check_apart(cfg, folder)
    if folder.name == UNFINISHED:
        raise UserError(
            f"output_dir: {cfg.output_dir!r}: {UNFINISHED!r} is what runs call a place of their own; choose another"
        )
    link = next(links(folder), None)
    if link is not None:
        raise UserError(
            f"output_dir: {str(link)!r} is a link to another place, which a run would write; remove the link"
        )
    _check_writable(existing, cfg.output_dir)
    _check_content(cfg, folder)


def _check_apart(cfg: Config, folder: Path) -> None:
    """Neither the folder of something that is read, nor inside it, nor around it; links do not hide that."""
    output = folder.resolve()
    for field, place in places_read(cfg):
        read = place.resolve()
        if output == read or output.is_relative_to(read) or read.is_relative_to(output):
            how = "is" if output == read else "lies in" if output.is_relative_to(read) else "contains"
            raise UserError(
                f"output_dir: {cfg.output_dir!r} {how} what {field} reads ({str(place)!r}); choose a folder apart"
            )


def places_read(cfg: Config) -> Iterator[tuple[str, Path]]:
    """(field, file or folder) of every source of the run that lies on a disk."""
    for field, value in _named_places(cfg):
        place = pipeline_path() if (field, value) == (MODEL, "minicanvas") else Path(value)
        if field not in NOT_READ and place.exists():
            yield field, place


def _named_places(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    hints = get_type_hints(type(section), include_extras=True)
    for name in type(section).model_fields:
        value, hint = getattr(section, name), hints.get(name)
        if isinstance(value, BaseModel):
            yield from _named_places(value, f"{prefix}{name}.")
        elif isinstance(value, str) and (hint == PathStr or PathStr in get_args(hint)):
            yield prefix + name, value


def _check_content(cfg: Config, folder: Path) -> None:
    work = working_place(cfg)
    if cfg.resume_from_checkpoint is not None:
        _check_resume(cfg.resume_from_checkpoint, work)
        if _lies_in(cfg.resume_from_checkpoint, work):
            return
    found = next(run_traces(folder), None)
    if found is not None and not cfg.overwrite_output_dir:
        resume = working_folder(folder, replaces=False, resumes=True)
        ways = ["choose another folder", *(["--resume_from_checkpoint latest"] if list_checkpoints(resume) else [])]
        raise UserError(
            f"output_dir: {cfg.output_dir!r} already holds a run ({found.relative_to(folder).parts[0]}); "
            f"{', '.join(ways)}, or --overwrite_output_dir"
        )
    if read_marker(folder) is None:
        foreign = sorted(path.name for path in folder.iterdir() if path.name != LOCK) if folder.is_dir() else []
        if foreign:
            raise UserError(
                f"output_dir: {cfg.output_dir!r} is not empty ({foreign[0]!r}), and no {MARKER} says that a run filled "
                "it; choose a new folder"
            )


def _lies_in(checkpoint: str, work: Path) -> bool:
    """Whether the checkpoint to go on from is the folder's own."""
    return (
        checkpoint == "latest" or not Path(checkpoint).is_dir() or Path(checkpoint).resolve().parent == work.resolve()
    )


def _check_resume(wanted: str, folder: Path) -> None:
    known = [entry.name for entry in list_checkpoints(folder)]
    listing = f"; known: {', '.join(known)}" if known else ""
    if wanted == "latest":
        if not known:
            raise UserError(
                f"resume_from_checkpoint: 'latest', but {str(folder)!r} has no checkpoint; "
                "leave it out to start, and set --checkpointing_steps to get some"
            )
    elif not Path(wanted).is_dir() and not (folder / wanted).is_dir():
        hint = nearest(Path(wanted).name, [*known, "latest"])
        raise UserError(f"resume_from_checkpoint: {wanted!r} is not a folder{listing}{hint}")


def existing_ancestor(folder: Path) -> Path:
    """The folder itself, or the nearest parent that exists (a file in the way counts)."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))


def _check_writable(folder: Path, named: str) -> None:
    try:
        # A permission bit does not tell of a read-only or full file system; an unnamed file does, and leaves nothing.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise UserError(f"output_dir: {named!r} cannot be written: {error.strerror or error}") from None


def last_words(stopped: stop.Stopped, cfg: Config | None) -> str:
    """What ended the run, what it has saved, and how to go on where that is possible."""
    ended = f"stopped by {signal.Signals(stopped.signum).name}"
    if stopped.saved is not None:
        return f"{ended}; {stopped.saved} is saved, continue with --resume_from_checkpoint latest"
    known = [] if cfg is None else list_checkpoints(working_folder(cfg.output_dir, replaces=False, resumes=True))
    if known:
        return f"{ended}; {known[-1].name} is there, continue with --resume_from_checkpoint latest"
    return f"{ended}; there is no checkpoint to continue from"
