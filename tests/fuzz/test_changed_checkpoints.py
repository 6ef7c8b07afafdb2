"""Checkpoints that a disk or a person changed, at random: seen, refused in one line, never executed."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Payload, sign
from hypothesis import given
from hypothesis import strategies as st
from test_text_input import TREES, nothing_but

from fastunlearn.config import Config
from fastunlearn.engines.zero.checkpoint_files import CheckpointFiles
from fastunlearn.errors import UserError
from fastunlearn.training.checkpoint import Position, load_checkpoint, save_checkpoint
from fastunlearn.training.checkpoint_files import MANIFEST, damage
from fastunlearn.training.resuming import find_checkpoint
from fastunlearn.utils.distributed import World
from fastunlearn.utils.files import save_tensors

WORLD = World(0, 1, torch.device("cpu"))
FILES = ("engine.pt", "parts-rank-0.pt", "state.json", MANIFEST)


class Tensors:
    """An engine and a part of a run at once."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"x": torch.arange(50.0), "step": 3}

    def save(self, folder: Path) -> None:
        save_tensors(self.state, folder / "engine.pt")

    def load(self, folder: Path) -> None:
        self.load_state_dict(CheckpointFiles().load(str(folder / "engine.pt"), map_location="cpu"))

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state["x"].copy_(state["x"])
        self.state["step"] = int(state["step"])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    out = tmp_path_factory.mktemp("run")
    assert save_checkpoint(config(out), WORLD, Tensors(), {"part": Tensors()}, Position(2, 1.0, 0.5, {"teacher": 2}))
    yield out
    torch.distributed.destroy_process_group()


def config(out: Path) -> Config:
    return Config.model_validate({"concepts": ["cat"], "output_dir": str(out), "resume_from_checkpoint": "latest"})


def resumed(out: Path) -> None:
    """As a run resumes; nothing but what was there is there afterwards."""
    before = sorted(str(path) for path in out.rglob("*"))
    folder = nothing_but(UserError, lambda: find_checkpoint(config(out), 1, is_main=False))
    if folder is not None:
        nothing_but(UserError, lambda: load_checkpoint(folder, WORLD, Tensors(), {"part": Tensors()}))
    assert sorted(str(path) for path in out.rglob("*")) == before


@given(st.sampled_from(FILES), st.integers(0, 2**32))
def test_bytes(original: Path, file: str, seed: int) -> None:
    """Without a new manifest every change is seen; with one, the content is refused or loaded, and nothing else."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        out = Path(shutil.copytree(original, Path(name) / "run"))
        folder = out / "checkpoint-2"
        content = bytearray((folder / file).read_bytes())
        for _ in range(draw.randint(1, 3)):
            place, how = draw.randrange(len(content)), draw.randrange(3)
            if how == 0:
                content[place] ^= 1 << draw.randrange(8)
            elif how == 1:
                del content[place : place + draw.randrange(1, 50)]
            else:
                content[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 50)))
        if bytes(content) == (folder / file).read_bytes():
            return
        (folder / file).write_bytes(content)
        if file != MANIFEST:
            assert damage(folder) is not None
            sign(folder)
        resumed(out)


@given(
    st.dictionaries(
        st.sampled_from(["update", "seconds", "evaluations", "world_size", "config", "model", "more"]), TREES
    )
)
def test_states(original: Path, changes: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        out = Path(shutil.copytree(original, Path(name) / "run"))
        file = out / "checkpoint-2" / "state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        sign(file.parent)
        resumed(out)


@given(TREES)
def test_manifests(original: Path, tree: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        out = Path(shutil.copytree(original, Path(name) / "run"))
        for content in (tree, {"files": tree}, {"files": {"engine.pt": tree}}):
            (out / "checkpoint-2" / MANIFEST).write_text(json.dumps(content))
            resumed(out)


@given(st.sampled_from(FILES[:2]), TREES, st.booleans(), st.booleans())
def test_other_contents(original: Path, file: str, tree: Any, zipped: bool, payload: bool) -> None:
    """Values of any shape where tensors are expected, among them one that acts when it is unpickled."""
    with tempfile.TemporaryDirectory() as name:
        out, marker = Path(shutil.copytree(original, Path(name) / "run")), Path(name) / "executed"
        content = {"x": tree, "part": Payload(marker) if payload else tree}
        torch.save(content, out / "checkpoint-2" / file, _use_new_zipfile_serialization=zipped)
        sign(out / "checkpoint-2")
        resumed(out)
        assert not marker.exists()
