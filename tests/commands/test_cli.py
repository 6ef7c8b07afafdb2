"""The ``fastunlearn`` command: dispatch, exit status and one-line errors. No command does its work here."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastunlearn import __version__, cli
from fastunlearn.commands import train

# command line -> words that the one line on stderr must hold
BAD = [
    (["trian"], ("'trian'", "train, presets, plan, evaluate, relearn, doctor, minicanvas", "nearest: train")),
    (["train"], ("concepts", "none given")),
    (["train", "--config", "configs/none.toml"], ("--config", "does not exist")),
    (["train", "--config"], ("--config", "value is missing")),
    (["train", "--concepts", "nein style"], ("'nein style'", "nearest: neon style")),
    (["train", "--concepts", "cat", "--num_gpus", "0"], ("--num_gpus", "'0'")),
    (["train", "--concepts", "cat", "--num_gpus", "two"], ("--num_gpus", "'two'")),
    (["train", "--preset"], ("--preset", "value is missing")),
    (["train", "--preset", "sdxl-24gb-styel"], ("preset: 'sdxl-24gb-styel'", "nearest: sdxl-24gb-style")),
    (["train", "--preset", "sdxl-24gb-style", "--config", "mine.toml"], ("--preset", "--config 'mine.toml'", "one of")),
    (["presets", "minicanvas-stile"], ("preset: ", "nearest: minicanvas-style")),
    (["presets", "--list"], ("presets", "--list")),
    (["plan"], ("concepts", "none given")),
    (["plan", "--preset", "sd15"], ("preset: 'sd15'", "fastunlearn presets")),
    (["plan", "--concepts", "cat", "--vram", "much"], ("--vram", "'much'")),
    (["plan", "--concepts", "cat", "--vram", "-1"], ("--vram", "'-1'")),
    (["plan", "--concepts", "cat", "--num_gpus", "0"], ("--num_gpus", "'0'")),
    (["plan", "--concepts", "cat", "--json", "maybe"], ("'maybe'", "unexpected argument")),
    (["plan", "--concepts", "cat", "--json=maybe"], ("--json", "'maybe'", "true or false")),
    (["evaluate"], ("evaluate", "--model")),
    (["relearn"], ("relearn", "--model")),
    (["relearn", "--model", "none", "--attack", "fulll"], ("--attack", "nearest: full")),
    (["doctor", "--make-randon", "sdxl", "x"], ("doctor", "--make-randon")),
    (["evaluate", "--model", "out", "--quik"], ("evaluate", "--quik")),
]


def replace_module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """Put a stand-in for a heavy module in place, so that dispatch is seen without its work."""
    module = ModuleType(name)
    for key, value in content.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def recorder(seen: list[Any], status: int) -> Callable[[Any], int]:
    """A command that only notes what it was given."""

    def command(given: Any) -> int:
        seen.append(given)
        return status

    return command


@pytest.fixture
def no_preflight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastunlearn.training.preflight.check_all", lambda _: None)


@pytest.mark.parametrize(("argv", "words"), BAD)
def test_bad_input_is_one_line_and_status_2(
    argv: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert not [word for word in words if word not in err], err


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"  {command} " in out for command in cli.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastunlearn {__version__}\n"


def test_the_package_is_the_command_too() -> None:
    command = [sys.executable, "-m", "fastunlearn", "trian"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "nearest: train" in done.stderr


def test_train_runs_in_this_process(monkeypatch: pytest.MonkeyPatch, no_preflight: None) -> None:
    seen: list[list[str]] = []
    replace_module(monkeypatch, "fastunlearn.train", main=recorder(seen, 7))
    assert cli.main(["train", "--num_gpus", "1", "--concepts", "cat", "--seed", "3"]) == 7
    assert seen == [["--concepts=cat", "--seed=3"]]


def test_several_ranks_go_through_the_launcher(monkeypatch: pytest.MonkeyPatch, no_preflight: None) -> None:
    seen: list[tuple[int, list[str]]] = []

    def started(count: int, command: list[str]) -> int:
        seen.append((count, command))
        return 143

    monkeypatch.setattr(train, "run_ranks", started)
    monkeypatch.setattr(train, "gpu_count", lambda: 2)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # set by the command for what it starts, it would stay for all tests
    assert cli.main(["train", "--concepts=cat", "--num_gpus=2"]) == 143
    ((count, command),) = seen
    assert count == 2 and command[:2] == [sys.executable, "-u"]
    assert Path(command[2]).name == "train.py" and command[3:] == ["--concepts=cat"]


@pytest.mark.parametrize(("gpus", "words"), [(0, "CPU cores"), (2, "2 GPUs")])
def test_too_many_ranks_are_not_launched(
    gpus: int, words: str, monkeypatch: pytest.MonkeyPatch, no_preflight: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "gpu_count", lambda: gpus)
    assert cli.main(["train", "--concepts", "cat", "--num_gpus", "100000"]) == 2
    assert words in capsys.readouterr().err


def test_plan_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def plan(config: Any, ranks: int, gib: float | None, as_json: bool) -> int:
        seen.append((config.seed, ranks, gib, as_json))
        return 1

    monkeypatch.setattr("fastunlearn.commands.plan.prepare_environment", lambda threads: None)
    monkeypatch.setattr("fastunlearn.commands.plan.run", plan)
    assert cli.main(["plan", "--concepts", "cat", "--seed", "3", "--vram", "24", "--num_gpus", "2", "--json"]) == 1
    assert cli.main(["plan", "--concepts", "cat"]) == 1
    assert seen == [(3, 2, 24.0, True), (42, 1, None, False)]


def test_evaluate_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Namespace] = []
    with monkeypatch.context() as patch:
        patch.setattr("fastunlearn.commands.evaluate.run", recorder(seen, 0))
        assert cli.main(["evaluate", "--model", str(tmp_path), "--json"]) == 0
    assert seen == [Namespace(model=str(tmp_path), json=True, quick=False, full=False)]
    assert cli.main(["evaluate", "--model", str(tmp_path / "other")]) == 2


def test_interruption_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    assert cli.main([]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    command = f"{sys.executable} -m fastunlearn.cli train --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage:") and "Traceback" not in done.stderr
