"""Command lines of `fastunlearn` with more entries in its registries.

`python extension_worker.py FOLDER` reads FOLDER/extension.json, {"entries": [["METHODS", name, "module:attribute"],
...], "commands": [[word, ...], ...]}, finds modules in FOLDER, and writes what each command returned and printed to
FOLDER/done.json. An entry has to be there before the configuration is imported, hence the process.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from fastunlearn import registry


def call(words: list[str]) -> dict[str, object]:
    """Run one command line as a user's shell would; what it returned and what it printed."""
    from fastunlearn import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status: object = cli.main(words)
        except SystemExit as leaving:
            status = leaving.code
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def main(folder: Path) -> None:
    """Enter the entries, run the commands one after the other."""
    asked = json.loads((folder / "extension.json").read_text(encoding="utf-8"))
    sys.path.insert(0, str(folder))
    for known, name, entry in asked["entries"]:
        getattr(registry, known).entries[name] = entry
    done = [call(words) for words in asked["commands"]]
    (folder / "done.json").write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
