"""``.fastunlearn.json``: by this file a folder is known as one that this program fills, and by its list what it wrote.

Only what stands in the list is ever replaced or removed. Everything else in such a folder is somebody else's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fastunlearn.utils.files import atomic_write_text

MARKER = ".fastunlearn.json"
MAX_BYTES = 16 * 2**20
Kind = Literal["run", "minicanvas build"]


class Marker(BaseModel):
    """What a folder is, and which files in it are ours."""

    model_config = ConfigDict(strict=True, extra="forbid")
    program: Literal["fastunlearn"] = "fastunlearn"
    version: Literal[1] = 1
    kind: Kind = "run"
    files: list[str] = []
    """Relative paths with forward slashes."""
    complete: bool = False
    """Of a folder with new results: all of them are there, and take the place of the old ones."""

    def paths(self) -> list[PurePosixPath]:
        """The files, those left out whose name would lead out of the folder."""
        paths = [PurePosixPath(name) for name in self.files]
        return [path for path in paths if path.parts and not path.is_absolute() and ".." not in path.parts]


def read_marker(folder: Path, kind: Kind = "run") -> Marker | None:
    """None where there is none of this kind, or one that is damaged."""
    try:
        with (folder / MARKER).open("rb") as file:
            found = Marker.model_validate_json(file.read(MAX_BYTES))
    except (OSError, ValueError, ValidationError, RecursionError):
        return None
    return found if found.kind == kind and "program" in found.model_fields_set else None


def write_marker(folder: Path, marker: Marker) -> None:
    """Make or change it.

    Raises:
        UserError: it cannot be written.
    """
    atomic_write_text(folder / MARKER, json.dumps(marker.model_dump(), indent=1) + "\n")


def record_files(folder: Path, names: Iterable[str], kind: Kind = "run") -> None:
    """Say that these files of ``folder`` are ours, before or right after they are written.

    Raises:
        UserError: the marker cannot be written.
    """
    marker = read_marker(folder, kind)
    known = Marker(kind=kind) if marker is None else marker
    files = sorted({*known.files, *names})
    if marker is None or files != known.files:
        write_marker(folder, known.model_copy(update={"files": files}))


def files_below(folder: Path, *parts: str) -> list[str]:
    """The files in ``folder/parts``, by their path in ``folder``; links are not followed."""
    found = folder.joinpath(*parts)
    inside = found.rglob("*") if found.is_dir() and not found.is_symlink() else [found]
    return [path.relative_to(folder).as_posix() for path in inside if path.is_file() and not path.is_symlink()]
