"""The Python of README and docs: it compiles, what needs nothing runs, and the examples of docs/developing.md train."""

from __future__ import annotations

import json
import os
from pathlib import Path

import forked
import pytest
from doc_pages import Block, blocks

WORKER = Path(__file__).resolve().parents[1] / "workers" / "examples_worker.py"
FILES = "# fastunlearn/"  # how an example begins that is a file of the package, or a line of the registry
RUNNABLE = [block for block in blocks("python") if block.needs is None and not block.text.startswith(FILES)]


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles(block: Block) -> None:
    text = block.text
    compile("{" + text + "}" if text.startswith(f"{FILES}registry.py") else text, str(block), "exec")


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, str(block), "exec"), {})


def test_the_examples_train(tmp_path: Path) -> None:
    """One run with all that docs/developing.md adds: through --help, planner, training, files, card and an attack."""
    own = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = forked.run([str(WORKER), str(tmp_path)], tmp_path, env=os.environ | own, anew="fastunlearn")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--replace.weight" in done.stdout
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Concept ablation (arXiv:2303.13516)" in card and "sgd" in card
    assert "Judged by a look at the colours" in card and "not one flat colour" in card
    moved = json.loads((tmp_path / "run" / "distances.json").read_text())
    assert moved and all(0 <= share < 0.1 for share in moved.values()) and any(moved.values())
    assert json.loads((tmp_path / "run" / "relearn.json").read_text())["attack"] == "biases"
