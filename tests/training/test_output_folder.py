"""What a run may fill: not what it reads, what others wrote, or what another run is filling. And how it replaces."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastunlearn.config import Config, load_config
from fastunlearn.errors import UserError
from fastunlearn.export.results import start_output
from fastunlearn.minicanvas import pipeline_path
from fastunlearn.training.output_folder import check_output_dir, claim, places_read, working_place
from fastunlearn.utils.folders.lock import folder_lock
from fastunlearn.utils.folders.marker import MARKER, Marker, read_marker, record_files, write_marker
from fastunlearn.utils.folders.replacing import mark_complete, put_in_place
from fastunlearn.utils.run_folder import LOCK, UNFINISHED, list_checkpoints

SOURCES = (
    "model.pretrained_model_name_or_path", "model.vae", "model.cache_dir", "retain.folder", "meta.forbidden_folder",
    "meta.related_folder", "meta.unrelated_folder",
)  # fmt: skip


def config(output: Path, *arguments: str) -> Config:
    return load_config(None, ["--concepts", "neon style", f"--output_dir={output}", *arguments])


def refusal(check: Callable[[Config], object], cfg: Config) -> str:
    with pytest.raises(UserError) as caught:
        check(cfg)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fill(folder: Path, *names: str, text: str = "") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text or name)


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def earlier_run(folder: Path, *names: str) -> None:
    fill(folder, *names, text="old")
    record_files(folder, names)


@pytest.mark.parametrize("field", SOURCES)
@pytest.mark.parametrize(("output", "how"), [("m", "is"), ("m/unet", "lies in"), ("", "contains"), ("link", "is")])
@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_what_is_read_is_never_written(field: str, output: str, how: str, overwrite: str, tmp_path: Path) -> None:
    fill(tmp_path, "m/unet/config.json")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    write_marker(tmp_path / "m", Marker(files=["unet/config.json"]))  # even where a run of ours had made it
    cfg = config(tmp_path / output, f"--{field}={tmp_path / 'm'}", f"--overwrite_output_dir={overwrite}")
    message = refusal(check_output_dir, cfg)
    assert f" {how} what {field} reads" in message and "overwrite" not in message
    assert set(contents(tmp_path / "m")) == {"unet/config.json"}


def test_a_single_file_and_the_embedded_model_are_read_too(tmp_path: Path) -> None:
    fill(tmp_path, "models/one.safetensors")
    file = f"--pretrained_model_name_or_path={tmp_path / 'models' / 'one.safetensors'}"
    assert "contains" in refusal(check_output_dir, config(tmp_path / "models", file))
    assert dict(places_read(config(tmp_path / "out"))) == {SOURCES[0]: pipeline_path()}
    assert "lies in" in refusal(check_output_dir, config(pipeline_path() / "out"))


@pytest.mark.parametrize(
    "name", ["notes.txt", "README.md", "unet/config.json", "logs/mine", "checkpoint-20/state.json"]
)
@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_a_folder_that_no_run_filled_is_refused(name: str, overwrite: str, tmp_path: Path) -> None:
    fill(tmp_path / "out", name, text="precious")
    message = refusal(check_output_dir, config(tmp_path / "out", f"--overwrite_output_dir={overwrite}"))
    assert "not empty" in message and name.split("/")[0] in message and "new folder" in message
    assert not any(word in message for word in ("overwrite", "delete", "remove"))
    assert contents(tmp_path / "out") == {name: "precious"}


@pytest.mark.parametrize("damage", ["{", "[]", '{"program": "other"}', "[" * 10**5, '{"files": ["../x"]}', "\udcff"])
def test_a_marker_that_is_not_ours_marks_nothing(damage: str, tmp_path: Path) -> None:
    fill(tmp_path, "notes.txt")
    (tmp_path / MARKER).write_bytes(damage.encode(errors="surrogateescape"))
    assert "not empty" in refusal(check_output_dir, config(tmp_path, "--overwrite_output_dir"))


def test_a_started_run_is_not_overwritten_unless_told_to(tmp_path: Path) -> None:
    earlier_run(tmp_path / "out", "train_log.jsonl")
    message = refusal(check_output_dir, config(tmp_path / "out"))
    assert "already holds a run (train_log.jsonl)" in message and "--overwrite_output_dir" in message
    assert "resume" not in message, "there is nothing to continue from"
    fill(tmp_path / "out" / "checkpoint-4", "state.json")
    assert "--resume_from_checkpoint latest" in refusal(check_output_dir, config(tmp_path / "out"))
    check_output_dir(config(tmp_path / "out", "--overwrite_output_dir"))
    assert (tmp_path / "out" / "train_log.jsonl").read_text() == "old"


def test_new_and_empty_folders_are_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / LOCK).write_text("{}")
    write_marker(tmp_path / "killed", Marker(files=["never.written"]))
    for name in ("empty", "killed", "new/deep"):
        check_output_dir(config(tmp_path / name))
    assert not (tmp_path / "new").exists()


def test_a_place_that_is_no_writable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(check_output_dir, config(tmp_path / "file"))
    assert "is a file" in refusal(check_output_dir, config(tmp_path / "file" / "below"))
    assert "cannot be written" in refusal(check_output_dir, config(Path("/proc/out")))
    assert UNFINISHED in refusal(check_output_dir, config(tmp_path / UNFINISHED))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # a check leaves nothing


@pytest.mark.parametrize("name", ["unet", "samples", "logs", "train_log.jsonl", "checkpoint-8", UNFINISHED, MARKER])
def test_a_link_is_not_followed_out(name: str, tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "x")
    earlier_run(tmp_path / "out", "config.toml")
    (tmp_path / "out" / name).unlink(missing_ok=True)
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    for more in ((), ("--overwrite_output_dir",)):
        assert name in refusal(check_output_dir, config(tmp_path / "out", *more))
    assert contents(tmp_path / "elsewhere") == {"x": "x"}


def test_resume_needs_a_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "out"
    latest = config(output, "--resume_from_checkpoint", "latest")
    assert "no checkpoint" in refusal(check_output_dir, latest)
    for step in (100, 20, 9):
        (output / f"checkpoint-{step}").mkdir(parents=True)
    check_output_dir(latest)
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    for given in ("checkpoint-20", str(output / "checkpoint-20")):
        check_output_dir(config(output, "--resume_from_checkpoint", given))
    message = refusal(check_output_dir, config(output, "--resume_from_checkpoint", str(output / "checkpoint-21")))
    assert "checkpoint-21" in message and "nearest: checkpoint-20" in message
    earlier_run(tmp_path / "other", "config.toml")
    message = refusal(check_output_dir, config(tmp_path / "other", f"--resume_from_checkpoint={output}/checkpoint-20"))
    assert "already holds a run" in message, "another run's checkpoint is no leave to write over this one"


def finished_replacement(folder: Path) -> None:
    """An old run with files of its user in between, and the whole results of a new one."""
    earlier_run(folder, "config.toml", "unet/config.json", "unet/old.safetensors", "logs/events.1", "relearn.json")
    fill(folder, "checkpoint-6/state.json", "mine.txt", "logs/mine.txt", "samples/mine.png", text="mine")
    fill(folder / UNFINISHED, "config.toml", "unet/config.json", "logs/events.2", "checkpoint-4/state.json", text="new")
    mark_complete(folder)


EXPECTED = {
    "config.toml": "new", "unet/config.json": "new", "logs/events.2": "new", "checkpoint-4/state.json": "new",
    "mine.txt": "mine", "logs/mine.txt": "mine", "samples/mine.png": "mine",
}  # fmt: skip


def test_new_results_take_the_place_of_what_a_run_wrote_and_of_nothing_else(tmp_path: Path) -> None:
    finished_replacement(tmp_path)
    put_in_place(tmp_path)
    assert contents(tmp_path) == EXPECTED
    marker = read_marker(tmp_path)
    assert marker is not None and set(marker.files) == {"config.toml", "unet/config.json", "logs/events.2"}
    assert not (tmp_path / UNFINISHED).exists()


def test_a_replacement_that_was_killed_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each step that changes the folder."""
    from fastunlearn.utils.folders import replacing

    names = ("record_files", "remove_files", "_move_up", "write_marker", "remove", "_remove_empty")
    for name in names:
        for calls in (1, 2, 3):
            folder = tmp_path / f"{name}-{calls}"
            finished_replacement(folder)
            real, left = getattr(replacing, name), [calls]

            def fatal(*arguments: object, real: Callable = real, left: list[int] = left) -> object:
                result = real(*arguments)
                left[0] -= 1
                if not left[0]:
                    raise KeyboardInterrupt
                return result

            with monkeypatch.context() as patch:
                patch.setattr(replacing, name, fatal)
                try:
                    put_in_place(folder)
                except KeyboardInterrupt:
                    assert not left[0]
            put_in_place(folder)
            assert contents(folder) == EXPECTED, name


def test_a_file_of_the_user_in_the_way_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    earlier_run(tmp_path, "config.toml")
    fill(tmp_path, "README.md", text="mine")
    fill(tmp_path / UNFINISHED, "config.toml", "README.md", text="new")
    mark_complete(tmp_path)
    put_in_place(tmp_path)
    assert contents(tmp_path) == {
        "config.toml": "new", "README.md": "mine", f"{UNFINISHED}/README.md": "new",
    }  # fmt: skip
    assert "README.md" in capsys.readouterr().err


def test_links_in_the_folders_are_deleted_and_never_their_targets(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    fill(elsewhere, "config.json", "deep/x", text="precious")
    earlier_run(out, "config.toml", "unet/config.json")
    (out / "unet" / "config.json").unlink()
    (out / "unet" / "config.json").symlink_to(elsewhere / "config.json")
    record_files(out, ["samples/x", "logs/x"])
    (out / "samples").symlink_to(elsewhere / "deep")
    fill(out / UNFINISHED, "config.toml", "unet/config.json", text="new")
    mark_complete(out)
    put_in_place(out)
    assert contents(elsewhere) == {"config.json": "precious", "deep/x": "precious"}
    assert (out / "unet" / "config.json").read_text() == "new" and not (out / "unet" / "config.json").is_symlink()


def test_a_run_that_replaces_leaves_the_old_results_until_it_is_whole(tmp_path: Path) -> None:
    earlier_run(tmp_path, "config.toml", "unet/config.json")
    before = contents(tmp_path)
    cfg = config(tmp_path, "--overwrite_output_dir")
    for _ in range(2):  # the second one takes the place of the first, which was killed
        with claim(cfg, is_main=True) as work:
            start_output(cfg.model_copy(update={"output_dir": str(work)}), resumed=False)
            fill(work, "checkpoint-2/state.json")
        assert {name: text for name, text in contents(tmp_path).items() if UNFINISHED not in name} == before
        assert set(contents(work)) == {"config.toml", "checkpoint-2/state.json"}
        assert f"output_dir = '{tmp_path}'" in (work / "config.toml").read_text().replace('"', "'")
    assert working_place(config(tmp_path, "--resume_from_checkpoint", "latest")) == work
    check_output_dir(config(tmp_path, "--resume_from_checkpoint", "latest"))


def test_one_process_holds_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep"
    code = f"""
import sys
from pathlib import Path
from fastunlearn.utils.folders.lock import folder_lock
with folder_lock(Path({str(out)!r}), "output_dir"):
    print("held", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "held\n"
    for cfg in (config(out), config(out, "--overwrite_output_dir")):
        with pytest.raises(UserError) as caught, claim(cfg, is_main=True):
            pass
        assert f"is in use by process {process.pid} on " in str(caught.value) and " since 2" in str(caught.value)
    process.kill()
    process.wait()
    with folder_lock(out, "output_dir"):  # a dead process holds nothing
        assert (out / LOCK).is_file()


def test_of_two_that_start_at_once_one_wins(tmp_path: Path) -> None:
    """Also where the folder is not there yet, and the winner takes its lock away at the end."""
    code = f"""
import os, sys, time
from pathlib import Path
from fastunlearn.errors import UserError
from fastunlearn.utils.folders.lock import folder_lock
folder, start = Path({str(tmp_path / "out")!r}), float(sys.stdin.readline())
time.sleep(max(0, start - time.time()))
for turn in range(100):
    try:
        with folder_lock(folder, "output_dir"):
            mine = os.open(folder / "alone", os.O_CREAT | os.O_EXCL)
            time.sleep(0.0005)
            os.close(mine)
            os.unlink(folder / "alone")
    except UserError as error:
        assert "is in use by " in str(error), error
"""
    pipe = subprocess.PIPE
    several = [subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stderr=pipe, text=True) for _ in range(3)]
    start = time.time() + 2
    for process in several:
        assert process.stdin is not None
        process.stdin.write(f"{start}\n")
        process.stdin.flush()
    errors = [process.communicate()[1] for process in several]
    assert not any(process.returncode for process in several), errors


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with folder_lock(tmp_path, "output_dir"):
        pass
    assert "without locks" in capsys.readouterr().err
