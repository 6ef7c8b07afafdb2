"""``--help``: instant for every command, and complete for the two that read a configuration."""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import ArgumentParser
from typing import get_args

import pytest

from fastunlearn import cli
from fastunlearn.config import Config, config_from_arguments, run_options
from fastunlearn.config.options import ALIASES, SWITCHES, fields_of
from fastunlearn.registry import ENGINES, METHODS, OPTIMIZERS
from fastunlearn.schema.fields import AttentionBackend

SECTIONS = run_options(ArgumentParser(prog="fastunlearn train")).sections


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no line is broken within a word that is looked for."""
    monkeypatch.setenv("COLUMNS", "400")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def listed(text: str) -> list[str]:
    """The options that a help text has, in its order."""
    return re.findall(r"^  (?:-h, )?--([\w.]+)", text, re.MULTILINE)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, command, "--help").startswith(f"usage: fastunlearn {command} ")


def test_help_and_checks_load_nothing_heavy() -> None:
    program = f"""
import contextlib, sys
from fastunlearn import cli
import fastunlearn.train, fastunlearn.training.preflight
for command in {list(cli.COMMANDS)}:
    with contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
print("loaded:", {{"torch", "diffusers", "deepspeed", "matplotlib"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: set()\n")


def test_train_help_begins_with_an_example_of_each_source(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "train", "--help").split("\noptions:\n")[0].splitlines()
    examples = [line for line in lines if line.startswith("  fastunlearn train --")]
    assert ["--preset" in examples[0], "--config" in examples[1], len(examples)] == [True, True, 2]


@pytest.mark.parametrize(("command", "own"), [("train", ["num_gpus"]), ("plan", ["num_gpus", "vram", "json"])])
def test_help_lists_every_field_once(command: str, own: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, command, "--help")
    fields = [name for name, _ in fields_of(Config)]
    assert listed(text)[: 3 + len(own)] == ["help", "preset", "config", *own]
    assert sorted(listed(text)[3 + len(own) :]) == sorted(fields)
    assert all(f"\n{section}:\n" in text for section in SECTIONS)


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize("section", SECTIONS)
def test_help_of_a_section(section: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, command, "--help", section)
    names = [name for name, _ in fields_of(Config)]
    prefix = f"{section}."
    expected = [name for name in names if (name.startswith(prefix) if section != "run" else "." not in name)]
    assert listed(text) == expected and len(expected) > 0
    aliases = [alias for alias, name in ALIASES.items() if name in expected]
    words = text.split()
    assert not [alias for alias in aliases if not {f"--{alias}{end}" for end in (")", ",", "")} & set(words)]


def test_help_shows_choices_defaults_and_aliases(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(printed(capsys, "train", "--help").split())
    for option, names in (
        ("method", METHODS),
        ("engine", ENGINES),
        ("optimizer.name", OPTIMIZERS),
        ("model.attention", get_args(AttentionBackend)),
    ):
        assert f"--{option} {{{','.join(names)}}} " in text
    assert "--train.relative_step X By how much of its rms" in text and "(default 0.005)" in text
    assert '--keep "TEXT; ..." ' in text and '--evaluation.seeds "N; ..." ' in text
    assert "--surgery.enabled {auto,true,false} " in text and "less than 1 % of" in text
    for alias, values in SWITCHES.items():
        assert f"also --{alias} for {values[True]})" in text


def test_the_launched_program_has_the_same_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config_from_arguments(["--help"])
    text = capsys.readouterr().out
    expected = ["usage: deepspeed fastunlearn/train.py [--preset NAME] [--config FILE] [--section.field VALUE ...]",
                "       deepspeed fastunlearn/train.py --help [SECTION]"]  # fmt: skip
    assert text.splitlines()[:2] == expected
    assert sorted(listed(text)[3:]) == sorted(name for name, _ in fields_of(Config))


@pytest.mark.parametrize("words", [("--help", "smapler"), ("--method", "esd", "-h", "smapler")])
def test_an_unknown_section_is_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *words]) == 2
    expected = "error: --help: 'smapler' is no section; `fastunlearn plan --help` shows all (nearest: sampler)\n"
    assert capsys.readouterr() == ("", expected)


def test_help_wins_over_what_stands_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(printed(capsys, "train", "--nonsense", "--help", "--seed"))[:2] == ["help", "preset"]
