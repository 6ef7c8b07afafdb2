"""New results that take the place of old ones, file by file, when all of them are there.

A run that replaces another works in ``unfinished/`` and leaves the old results alone. When it has succeeded, that
folder is marked complete and moved up. A kill in between is made good by calling `put_in_place` once more.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path, PurePosixPath

from fastunlearn.utils.files import remove, write_errors
from fastunlearn.utils.folders.marker import MARKER, Marker, files_below, read_marker, record_files, write_marker
from fastunlearn.utils.run_folder import CONFIG, LOCK, UNFINISHED, list_checkpoints


def working_folder(folder: str | Path, *, replaces: bool, resumes: bool) -> Path:
    """Where a run writes: ``folder`` itself, or below it where older results stay until the new ones are whole."""
    work = Path(folder) / UNFINISHED
    if resumes and (work / CONFIG).is_file():
        marker = read_marker(work)
        return Path(folder) if marker is not None and marker.complete else work
    return work if replaces else Path(folder)


def mark_complete(folder: Path) -> None:
    """Say of ``folder/unfinished`` that it holds whole results, once the old run's checkpoints are gone.

    Raises:
        UserError: it cannot be written.
    """
    work = folder / UNFINISHED
    for checkpoint in list_checkpoints(folder):
        remove(checkpoint)
    files = [name for name in files_below(work) if not _is_checkpoint_file(name) and name not in (MARKER, LOCK)]
    write_marker(work, Marker(files=sorted(files), complete=True))


def put_in_place(folder: Path) -> None:
    """Move what is complete in ``folder/unfinished`` to ``folder``, and remove what the run before had written.

    A file that is in the way and not ours stays; the new one then stays in ``unfinished/``, and a line says so.

    Raises:
        UserError: a file cannot be moved.
    """
    work = folder / UNFINISHED
    new = None if work.is_symlink() else read_marker(work)
    if new is None or not new.complete:
        return
    old = read_marker(folder) or Marker()
    ours, coming = set(old.paths()), set(new.paths())
    record_files(folder, new.files)
    with write_errors(folder):
        remove_files(folder, ours - coming)
        left = [path for path in sorted(coming) if not _move_up(folder, path, path in ours)]
        for checkpoint in list_checkpoints(work):
            os.replace(checkpoint, folder / checkpoint.name)
    write_marker(folder, Marker(files=sorted(set(new.files) - {path.as_posix() for path in left})))
    remove(work / MARKER)
    _remove_empty(work)
    if left:
        print(f"{folder / left[0]} is not of a run and stays as it is; the new one is in {work}", file=sys.stderr)


def clear_unfinished(folder: Path) -> None:
    """Remove what a run that replaces another left half done: its files by name, and its checkpoints."""
    work = folder / UNFINISHED
    marker = read_marker(work)
    if marker is None:
        return
    for checkpoint in list_checkpoints(work):
        remove(checkpoint)
    remove_files(work, set(marker.paths()))
    remove(work / MARKER)
    _remove_empty(work)


def remove_files(folder: Path, names: set[PurePosixPath]) -> None:
    """Delete files by name, then the folders that this leaves empty. What a link points to stays."""
    for name in names:
        path = folder / name
        if not _leads_out(folder, name) and (path.is_symlink() or not path.is_dir()):
            remove(path)
    for parent in sorted({parent for name in names for parent in name.parents if parent.parts}, reverse=True):
        if not _leads_out(folder, parent / "x"):
            with suppress(OSError):
                (folder / parent).rmdir()


def _move_up(folder: Path, name: PurePosixPath, ours: bool) -> bool:
    """Whether the file is in its final place, now or since an earlier attempt."""
    source, target = folder / UNFINISHED / name, folder / name
    if not source.is_file():
        return True
    if _leads_out(folder, name) or target.is_dir() or (os.path.lexists(target) and not ours):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
    return True


def _leads_out(folder: Path, name: PurePosixPath) -> bool:
    """Whether a folder on the way to the file is a link."""
    return any((folder / parent).is_symlink() for parent in name.parents if parent.parts)


def _is_checkpoint_file(name: str) -> bool:
    return PurePosixPath(name).parts[0].lstrip(".").startswith("checkpoint-")


def _remove_empty(folder: Path) -> None:
    """Remove the folder and those in it, as far as nothing is left in them."""
    for path in sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True):
        with suppress(OSError):
            path.rmdir()
    with suppress(OSError):
        folder.rmdir()
