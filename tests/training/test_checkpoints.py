"""Checkpoints that a disk, a kill or a person has spoilt: never half a one, never another run's, never executed."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from checkpoints import Payload, change_state, sign

from fastunlearn.config import Config
from fastunlearn.engines.zero.checkpoint_files import CheckpointFiles
from fastunlearn.errors import UserError
from fastunlearn.minicanvas import pipeline_path
from fastunlearn.models import identity
from fastunlearn.training import checkpoint_files
from fastunlearn.training.checkpoint import Position, load_checkpoint, save_checkpoint
from fastunlearn.training.checkpoint_files import MANIFEST, damage
from fastunlearn.training.resuming import find_checkpoint
from fastunlearn.utils.distributed import World
from fastunlearn.utils.files import save_tensors
from fastunlearn.utils.run_folder import list_checkpoints

ROOT = Path(__file__).resolve().parents[2]
WORLD = World(0, 1, torch.device("cpu"))
SIZES = (3, 700, 40_000)


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Tensors:
    """Something with state, as an engine or a part of a run has it."""

    def __init__(self, value: float = 0.0) -> None:
        self.state: dict[str, Any] = {f"x{size}": torch.full((size,), value) for size in SIZES}

    def save(self, folder: Path) -> None:
        save_tensors(self.state, folder / "engine.pt")

    def load(self, folder: Path) -> None:
        self.state = torch.load(folder / "engine.pt", weights_only=True)

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def config(folder: Path, **fields: Any) -> Config:
    return Config.model_validate({"concepts": ["cat"], "output_dir": str(folder)} | fields)


def save(cfg: Config, update: int) -> Path | None:
    position = Position(update, 1.5, 0.5, {"teacher": update})
    return save_checkpoint(cfg, WORLD, Tensors(update), {"part": Tensors(-update)}, position)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    cfg, engine, part = config(tmp_path), Tensors(), Tensors()
    folder = save(cfg, 3)
    assert folder is not None and names(tmp_path) == ["checkpoint-3"]
    assert set(json.loads((folder / MANIFEST).read_text())["files"]) == {
        "engine.pt", "parts-rank-0.pt", "state.json",
    }  # fmt: skip
    assert load_checkpoint(folder, WORLD, engine, {"part": part}) == Position(3, 1.5, 0.5, {"teacher": 3})
    assert all(engine.state[f"x{size}"].eq(3).all() and part.state[f"x{size}"].eq(-3).all() for size in SIZES)


def test_the_oldest_go_and_later_ones_of_an_earlier_pass_stay(tmp_path: Path) -> None:
    cfg = config(tmp_path, checkpoint={"checkpoints_total_limit": 2})
    for update in (2, 4, 6, 3):
        save(cfg, update)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4", "checkpoint-6"]
    save(cfg, 6)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("file", ["engine.pt", "parts-rank-0.pt", "state.json", MANIFEST])
@pytest.mark.parametrize("harm", ["a flipped bit", "cut", "emptied", "missing"])
def test_damage_is_seen_and_latest_falls_back(
    tmp_path: Path, file: str, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path)
    save(cfg, 2)
    broken = save(cfg, 4)
    assert broken is not None and damage(broken) is None
    content = bytearray((broken / file).read_bytes())
    if harm == "a flipped bit":
        content[len(content) // 2] ^= 1
    kept = {"cut": len(content) - 1, "emptied": 0}.get(harm, len(content))
    (broken / file).write_bytes(bytes(content[:kept]))
    if harm == "missing":
        (broken / file).unlink()
    latest = config(tmp_path, resume_from_checkpoint="latest")
    assert find_checkpoint(latest, 1) == tmp_path / "checkpoint-2"
    said = capsys.readouterr().err.strip()
    assert said.startswith("checkpoint-4 is damaged: ") and "\n" not in said
    assert file in said or file == MANIFEST  # a hash that was changed points to the file that it belonged to
    with pytest.raises(UserError, match=r"resume_from_checkpoint: .*checkpoint-4"):
        find_checkpoint(config(tmp_path, resume_from_checkpoint="checkpoint-4"), 1)
    (tmp_path / "checkpoint-2" / "engine.pt").unlink()
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        find_checkpoint(latest, 1)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_manifest_reads_nothing_outside(tmp_path: Path, name: str) -> None:
    folder = save(config(tmp_path), 2)
    assert folder is not None
    (folder / MANIFEST).write_text(json.dumps({"files": {name: {"bytes": 1, "sha256": "0"}}}))
    assert damage(folder) == f"{MANIFEST} names a file outside"


def written_bytes(folder: Path) -> int:
    return max(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_disk_that_fills_at_any_byte_costs_this_checkpoint_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for the disk: the system refuses the same calls, at any byte."""
    cfg = config(tmp_path)
    first = save(cfg, 1)
    assert first is not None
    total = written_bytes(first)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    saved = 0
    for limit in [*range(0, total, 3671), *range(total - 40, total + 2)]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            folder = save(cfg, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        said = capsys.readouterr().err
        if folder is None:
            assert names(tmp_path) == ["checkpoint-1"], limit
            assert said.startswith("warning: checkpoint-2 is not saved") and said.count("\n") == 1
        else:
            assert damage(folder) is None and limit >= total
            saved += 1
            checkpoint_files.drop(folder)
    assert saved == 2 and damage(first) is None
    assert save(cfg, 2) is not None, "the next try, with room"


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert save(config(tmp_path / "file"), 2) is None
    assert "checkpoint-2 is not saved, the run goes on" in capsys.readouterr().err


def test_a_kill_while_an_old_one_goes_leaves_none_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, checkpoint={"checkpoints_total_limit": 1})
    save(cfg, 1)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    def killed_after_some_files(path: Path) -> None:
        if path.exists():
            (path / "engine.pt").unlink()
            killed(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "remove", killed_after_some_files)
        with pytest.raises(KeyboardInterrupt):
            save(cfg, 2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    save(cfg, 3)
    assert names(tmp_path) == ["checkpoint-3"], "what the kill left is gone"


def resumed(cfg: Config, **fields: Any) -> Path | None:
    asked = cfg.model_dump() | fields | {"resume_from_checkpoint": "latest"}
    return find_checkpoint(Config.model_validate(asked), 1)


def test_what_changes_nothing_may_change(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    folder = save(cfg, 2)
    train = cfg.train.model_copy(update={"logging_steps": 3, "memory_check": "off"})
    assert resumed(cfg, train=train, checkpoint={"checkpointing_steps": 1}, evaluation={"mode": "off"}) == folder


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seed": 1}, ["seed 42", "has 1"]),
        ({"train": {"learning_rate": 0.5}}, ["train.learning_rate (nothing)", "has 0.5"]),
        ({"concepts": ["fish"]}, ["concepts", "'cat'", "'fish'"]),
        ({"seed": 1, "train": {"learning_rate": 0.5}}, ["1 more: "]),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_and_both_values(tmp_path: Path, fields: dict[str, Any], said: list[str]) -> None:
    cfg = config(tmp_path)
    save(cfg, 2)
    with pytest.raises(UserError) as error:
        resumed(cfg, **fields)
    assert all(part in str(error.value) for part in said), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_more_and_fewer_updates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config(tmp_path, train={"max_train_steps": 10})
    folder = save(cfg, 4)
    for steps in (20, 6, 4):
        assert resumed(cfg, train={"max_train_steps": steps}) == folder
        assert f"4 of then 10 updates are made; this run goes on to {steps}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"has made 4 updates already, and train.max_train_steps is 3"):
        resumed(cfg, train={"max_train_steps": 3})


def test_another_number_of_updates_needs_a_constant_rate(tmp_path: Path) -> None:
    cfg = config(tmp_path, train={"max_train_steps": 10, "lr_scheduler": "cosine"})
    save(cfg, 4)
    with pytest.raises(UserError, match=r"max_train_steps 10, this one has 20.*'cosine' follows it"):
        resumed(cfg, train={"max_train_steps": 20, "lr_scheduler": "cosine"})


def test_the_same_model_elsewhere_is_the_same_and_another_is_not(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(pipeline_path(), here)
    shutil.copytree(pipeline_path(), there)
    model = {"pretrained_model_name_or_path": str(here)}
    cfg = config(tmp_path / "out", model=model, keep=["fish"])
    folder = save(cfg, 2)
    assert resumed(cfg, model={"pretrained_model_name_or_path": str(there)}) == folder
    weights = next((there / "unet").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    identity._digest.cache_clear()  # in a process of its own
    with pytest.raises(UserError, match=r"belongs to a run of another model; the files of .*there"):
        resumed(cfg, model={"pretrained_model_name_or_path": str(there)})


@pytest.mark.parametrize("state", ["[]", "{}", "{", '{"update": NaN}', "[" * 100_000, '{"update": ' + "9" * 5000 + "}"])
def test_a_state_of_another_shape_is_one_line(tmp_path: Path, state: str) -> None:
    folder = save(config(tmp_path), 2)
    assert folder is not None
    (folder / "state.json").write_text(state)
    sign(folder)
    with pytest.raises(UserError, match=r"checkpoint-2/state.json cannot be read"):
        resumed(config(tmp_path))


def test_tensors_of_something_else_are_one_line(tmp_path: Path) -> None:
    folder = save(config(tmp_path), 2)
    assert folder is not None
    torch.save({"nobody": {}}, folder / "parts-rank-0.pt")
    sign(folder)
    with pytest.raises(UserError, match="checkpoint-2 does not hold the state of this run"):
        load_checkpoint(folder, WORLD, Tensors(), {"part": Tensors()})


@pytest.mark.parametrize("zipped", [True, False])
def test_deepspeeds_files_execute_nothing(tmp_path: Path, zipped: bool) -> None:
    file, marker = tmp_path / "states.pt", tmp_path / "executed"
    torch.save({"module": Payload(marker)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        CheckpointFiles().load(str(file), map_location="cpu")
    assert not marker.exists()


TRAIN = [
    str(ROOT / "fastunlearn" / "train.py"), "--concepts", "neon style", "--train.max_train_steps", "3",
    "--sampler.num_inference_steps", "4", "--train.cpu_threads", "1", "--evaluation.mode", "off",
    "--progress.enabled", "false",
    "--evaluation.num_inference_steps", "2", "--report.num_validation_seeds", "1", "--report.report_to", "none",
    "--checkpointing_steps", "2",
]  # fmt: skip
ENGINES = {"zero": ("--zero.stage", "2"), "fused": ("--engine", "fused")}


@pytest.mark.parametrize("engine", ENGINES)
def test_no_file_of_a_checkpoint_is_executed(tmp_path: Path, engine: str) -> None:
    """A payload in every file that holds tensors, one after the other, in a checkpoint whose manifest fits."""

    def train(*more: str) -> subprocess.CompletedProcess[str]:
        words = [*TRAIN, *ENGINES[engine], "--output_dir", str(tmp_path / "out"), *more]
        return forked.run(words, tmp_path / "printed", cwd=tmp_path)

    assert train().returncode == 0
    folder, marker = tmp_path / "out" / "checkpoint-2", tmp_path / "executed"
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix not in (".json",))
    assert len(files) >= 2 and all(file.suffix == ".pt" for file in files), files
    for file in files:
        whole = file.read_bytes()
        torch.save({"module": Payload(marker)}, file)
        sign(folder)
        done = train("--resume_from_checkpoint", "latest")
        assert done.returncode == 2 and not marker.exists(), (file.name, done.stderr)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "checkpoint-2 does not hold the state" in lines[0], done.stderr
        file.write_bytes(whole)
    change_state(folder, seconds=2.0)
    assert train("--resume_from_checkpoint", "latest").returncode == 0
