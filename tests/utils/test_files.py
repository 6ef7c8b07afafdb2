"""Atomic writing: what a reader finds after success, failure and a kill."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastunlearn.errors import UserError
from fastunlearn.export.formats.delta import write_delta
from fastunlearn.utils import files
from fastunlearn.utils.files import atomic_file, atomic_folder, atomic_write_text, save_tensors


def test_text_is_written_and_replaced_without_leftovers(tmp_path: Path) -> None:
    target = tmp_path / "new" / "metrics.json"
    atomic_write_text(target, "one")
    atomic_write_text(target, "zwei ü")
    assert target.read_text(encoding="utf-8") == "zwei ü"
    assert [file.name for file in target.parent.iterdir()] == ["metrics.json"]


def test_a_failing_block_leaves_the_old_file_and_no_leftover(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(KeyError), atomic_file(target) as partial:
        partial.write_text("half")
        raise KeyError("not ours")
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
def test_a_folder_changes_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda left, right: False)
    target = tmp_path / "unet"
    target.mkdir()
    (target / "old.bin").write_text("old")
    with atomic_folder(target) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "new.bin").write_text("new")
        assert (target / "old.bin").read_text() == "old"
    assert [file.name for file in target.rglob("*")] == ["sub", "new.bin"]
    assert [file.name for file in tmp_path.iterdir()] == ["unet"]


def test_a_failing_block_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "unet"
    target.mkdir()
    (target / "old.bin").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as partial:
        (partial / "new.bin").write_text("new")
        raise ZeroDivisionError
    assert [file.name for file in tmp_path.rglob("*")] == ["unet", "old.bin"]


KILLED = """
import os, signal, sys
from pathlib import Path
from fastunlearn.utils import files
stage, target = sys.argv[1], Path(sys.argv[2])
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if stage == "before-swap":
    files.swap = die
elif stage == "after-exchange":
    files.remove = lambda path: die() if path.name.endswith("partial") and target.joinpath("new").exists() else None
elif stage == "between-renames":
    files._exchange = lambda *_: False
    rename = os.replace
    files.os.replace = lambda a, b: (rename(a, b), die())
with files.atomic_folder(target) as partial:
    (partial / "new").write_text("new")
"""


@pytest.mark.parametrize("stage", ["before-swap", "after-exchange", "between-renames"])
def test_a_kill_leaves_a_whole_folder_and_the_next_write_cleans_up(tmp_path: Path, stage: str) -> None:
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "old").write_text("old")
    run = subprocess.run([sys.executable, "-c", KILLED, stage, str(target)], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    whole = tmp_path / ".checkpoint.previous" if stage == "between-renames" else target
    assert [file.name for file in whole.iterdir()] == ["new" if stage == "after-exchange" else "old"]
    with atomic_folder(target) as partial:
        if stage == "between-renames":
            assert (target / "old").read_text() == "old"
        assert not list(partial.iterdir())
        (partial / "third").write_text("3")
    assert [file.name for file in tmp_path.rglob("*")] == ["checkpoint", "third"]


def test_a_path_below_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*blocked/run/metrics.json: .*another folder"):
        atomic_write_text(tmp_path / "blocked" / "run" / "metrics.json", "{}")
    with pytest.raises(UserError, match="cannot write"), atomic_folder(tmp_path / "blocked" / "unet"):
        pass


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "writable"), (errno.EROFS, "read-only")]
)
def test_the_error_names_path_and_remedy(tmp_path: Path, number: int, remedy: str) -> None:
    target = tmp_path / "metrics.json"
    with pytest.raises(UserError, match=remedy) as caught, atomic_file(target) as partial:
        raise OSError(number, os.strerror(number), str(partial))
    assert str(target) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_about_other_files_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "out" / "a.txt"):
        Path("/nonexistent/input.bin").read_bytes()
    with pytest.raises(RuntimeError, match="shape"), atomic_file(tmp_path / "out" / "a.txt"):
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize("writer", ["text", "safetensors", "torch"])
def test_a_disk_that_takes_no_more_is_a_user_error(tmp_path: Path, writer: str) -> None:
    """The limit on file sizes stands for a full disk: the same write fails half-way."""
    target = tmp_path / "big"
    target.write_text("old")
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_action = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old_limit[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*big"), atomic_file(target) as partial:
            if writer == "text":
                partial.write_text("x" * 100_000)
            elif writer == "safetensors":
                save_file({"w": torch.zeros(100_000)}, partial)
            else:
                torch.save({"w": torch.zeros(100_000)}, partial)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_action)
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["big"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_asks_for(tmp_path: Path, umask: int, mode: int) -> None:
    """Safetensors makes its own readable for nobody else."""
    before = os.umask(umask)
    try:
        write_delta({"a": torch.zeros(2)}, tmp_path / "delta.safetensors", {})
        with atomic_folder(tmp_path / "unet") as partial:
            save_file({"a": torch.zeros(2)}, partial / "model.safetensors")
            (partial / "config.json").write_text("{}")
        save_tensors({"a": torch.zeros(2)}, tmp_path / "state.pt")
        atomic_write_text(tmp_path / "a.json", "{}")
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 5 and {file.stat().st_mode & 0o777 for file in files} == {mode}


def test_without_a_home_folder_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none in a folder called ~ of the place where the command was started."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user that the system does not know
    place = files.cache_folder() / "a.json"
    assert place.is_absolute()
    with pytest.raises(OSError, match="Not a directory"):
        place.read_text()
    with pytest.raises(UserError, match="cannot write"):
        atomic_write_text(place, "{}")
