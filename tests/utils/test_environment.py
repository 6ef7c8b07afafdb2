"""Start-up: where caches of compiled code go when there is no home folder to write."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from fastunlearn.utils import environment


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where they go on a machine without a home folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "absent"))
    for name in environment.CACHES:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    return tmp_path / f"fastunlearn-caches-{os.getuid()}"


def used() -> Path:
    environment._find_room_for_caches()
    return Path(os.environ["TRITON_CACHE_DIR"]).parent


def test_without_a_home_folder_caches_go_to_a_folder_of_ones_own(caches: Path) -> None:
    assert used() == caches
    assert stat.S_IMODE(caches.stat().st_mode) == 0o700
    assert used() == caches


@pytest.mark.parametrize("planted", ["folder that others may write", "link", "file"])
def test_what_somebody_else_may_have_put_there_is_not_used(caches: Path, tmp_path: Path, planted: str) -> None:
    if planted == "link":
        (tmp_path / "theirs").mkdir()
        caches.symlink_to(tmp_path / "theirs")
    elif planted == "file":
        caches.touch()
    else:
        caches.mkdir()
        caches.chmod(0o777)
    folder = used()
    assert folder != caches and folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_without_any_temporary_folder_a_run_goes_on(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    environment._find_room_for_caches()
    assert "TRITON_CACHE_DIR" not in os.environ
