"""Checkpoints as a person or a disk could have changed them. Not a test itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fastunlearn.training.checkpoint_files import MANIFEST, records


def sign(folder: Path) -> None:
    """A manifest that fits what the files now hold, as somebody who wants to be believed would make it."""
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / MANIFEST).write_text(json.dumps({"files": records(folder)}))


def change_state(folder: Path, **values: object) -> None:
    """Other values in ``state.json``, signed."""
    file = folder / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    sign(folder)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.marker,)
