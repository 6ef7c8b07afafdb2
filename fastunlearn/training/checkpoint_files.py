"""The files of a checkpoint as files: how it becomes whole, what proves that it still is, how it goes.

A checkpoint is written beside its final name and renamed when every rank is done; one that goes loses its name first.
So one that has its name is whole, unless the disk or a person changed it: ``manifest.json`` has the size and the
SHA-256 of each file, and a resume looks at them all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from fastunlearn.errors import UserError
from fastunlearn.utils.files import atomic_write_text, flush_folder, recover, remove, sibling, swap
from fastunlearn.utils.foreign import json_object
from fastunlearn.utils.run_folder import CHECKPOINT, list_checkpoints

MANIFEST = "manifest.json"


class FileRecord(BaseModel):
    """What a file was when it was written."""

    model_config = ConfigDict(strict=True, extra="forbid")
    bytes: NonNegativeInt
    sha256: str


class Manifest(BaseModel):
    """The files of a checkpoint by their path in it."""

    model_config = ConfigDict(strict=True, extra="forbid")
    files: dict[str, FileRecord]


def new_folder(final: Path) -> Path:
    """An empty folder beside ``final`` in which it is made, after what an earlier run left half done is gone."""
    for entry in final.parent.glob(".checkpoint-*"):
        name, _, kind = entry.name[1:].rpartition(".")
        if CHECKPOINT.fullmatch(name):
            if kind == "previous":
                recover(final.with_name(name))
            elif kind in ("partial", "deleted"):
                remove(entry)
    partial = sibling(final, "partial")
    partial.mkdir(parents=True)
    return partial


def records(folder: Path, share: int = 0, shares: int = 1) -> dict[str, dict[str, Any]]:
    """Size and hash of each file in ``folder``, or of one of several shares of them."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): _record(file) for file in files[share::shares]}


def finish(partial: Path, final: Path, files: Mapping[str, Any]) -> None:
    """Give the folder its manifest and its name."""
    atomic_write_text(partial / MANIFEST, json.dumps({"files": dict(sorted(files.items()))}, indent=1))
    flush_folder(partial)
    swap(partial, final)


def drop_older(newest: Path, limit: int) -> None:
    """Of the checkpoints up to ``newest`` keep the last ``limit``. Later ones, of a run that went on from an earlier
    state than its last, are not touched."""
    known = list_checkpoints(newest.parent)
    for old in known[: known.index(newest) + 1][:-limit]:
        drop(old)


def drop(folder: Path) -> None:
    """Delete a checkpoint: first its name, so that a kill leaves nothing that looks whole."""
    nameless = sibling(folder, "deleted")
    remove(nameless)
    folder.rename(nameless)
    remove(nameless)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None: they are as they were written.

    Every file that the manifest lists is read; others are nobody's business, since nothing reads them.
    """
    try:
        manifest = Manifest.model_validate(json_object(folder / MANIFEST))
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, ValidationError):
        return f"{MANIFEST} is damaged"
    for name, record in manifest.files.items():
        file = folder / name
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            return f"{MANIFEST} names a file outside"
        try:
            if not file.is_file():
                return f"{name} is missing"
            size = file.stat().st_size
            if size != record.bytes:
                return f"{name} has {size} bytes instead of {record.bytes}"
            if _record(file)["sha256"] != record.sha256:
                return f"{name} has changed since it was written"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({getattr(error, 'strerror', None) or error})"
    return None


def _record(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": stream.tell(), "sha256": digest}


def check_whole(folder: Path) -> None:
    """Refuse a checkpoint whose files are not as they were written.

    Raises:
        UserError: names the file.
    """
    reason = damage(folder)
    if reason is not None:
        raise UserError(f"resume_from_checkpoint: {folder.name} is damaged: {reason}; use another one, or 'latest'")
