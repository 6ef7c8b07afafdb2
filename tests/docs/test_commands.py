"""Every command of README and docs is run, or read by the program that it calls; none is only written down.

Cheap commands run as they stand. Of a training or a benchmark the arguments are read and checked, models that only the
reader has apart. What needs more than a CPU and seconds must say so in a comment above its block; its arguments are
read all the same.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, Block, Command, blocks, commands, header_commands

COMMANDS = list(commands())
OWN_FILES = ("my_model.safetensors", "path/to/sdxl")
"""Models that the reader has; the pages use these names for them."""
CHEAP = ("presets", "doctor", "--help")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run_cli(*words: str) -> int:
    from fastunlearn import cli

    with contextlib.suppress(SystemExit):
        return cli.main(words)
    return 0


def train(words: tuple[str, ...]) -> None:
    """A training: its configuration exists, and the model in it is one that can be loaded, unless the reader has it."""
    from fastunlearn.config import config_from_arguments
    from fastunlearn.training.preflight import check_model

    if "--help" in words:
        assert run_cli("train", *words) == 0
        return
    config = config_from_arguments(without_option(words, "num_gpus"))
    assert config.concepts
    model = config.model.pretrained_model_name_or_path
    if config.uses_minicanvas:
        check_model(config)
    elif model.endswith(".safetensors"):
        assert model in OWN_FILES
        assert config.model.variant is None, "a single file has no variant, and is refused with one"


def without_option(words: tuple[str, ...], *names: str) -> list[str]:
    """Without ``--name VALUE``."""
    rest = list(words)
    for name in names:
        if f"--{name}" in rest:
            place = rest.index(f"--{name}")
            del rest[place : place + 2]
    return rest


def fastunlearn(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb, *rest = command.words[1:]
    if verb == "train":
        train(tuple(rest))
    elif verb == "plan":
        train(tuple(without_option(tuple(rest), "vram")))
    elif verb in ("evaluate", "relearn"):
        # In an empty folder: that the run is missing is noticed once the options have been read.
        with contextlib.chdir(tmp_path):
            assert run_cli(verb, *rest) == 2
        assert "has no config.toml" in capsys.readouterr().err
    elif verb in CHEAP and (verb == "presets" or not rest):
        assert run_cli(verb, *rest) == 0
    elif verb == "minicanvas" and rest[0] == "path":
        assert run_cli(verb, *rest) == 0
        assert (Path(capsys.readouterr().out.strip()) / "model_index.json").is_file()
    elif verb == "minicanvas" and rest[0] == "sample" and "--prompt" in rest:
        with contextlib.chdir(tmp_path):
            assert run_cli(verb, *rest, "--steps", "2") == 0
    else:
        assert command.block.needs, "neither run nor marked"
        assert run_cli(verb, "--help") == 0


def launched(command: Command, *_: object) -> None:
    words = list(command.words)
    place = words.index("fastunlearn/train.py")
    train(tuple(words[place + 1 :]))


def make(command: Command, *_: object) -> None:
    target = command.words[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def pytest_command(command: Command, *_: object) -> None:
    names = [word for word in command.words[1:] if word.startswith(("tests", "benchmarks"))]
    assert names and all((ROOT / name.partition("::")[0]).exists() for name in names)


def python(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = list(command.words[1:])
    if words[:2] == ["-m", "venv"]:
        return
    program = re.fullmatch(r"(?:benchmarks|\.\./\.\.)/((?:quality|update)/\w+)\.py", words[0])
    assert program, "a program that the test does not know"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        importlib.import_module(program[1].replace("/", ".")).arguments()


def known_as_it_stands(command: Command, *_: object) -> None:
    """Set-up, which the packaging test and `make test` do; and tools, which ``make lint`` calls with these words."""
    stands = {
        "pip install .",
        "source .venv/bin/activate",
        "ruff check .",
        "mypy",
        "cd benchmarks/results/first_edition",
    }
    assert " ".join(command.words) in stands


Handler = Callable[..., None]
HANDLERS: dict[str, Handler] = {
    "fastunlearn": fastunlearn,
    "deepspeed": launched,
    "torchrun": launched,
    "make": make,
    "pytest": pytest_command,
    "python": python,
    "python3": python,
}
HANDLERS |= {name: known_as_it_stands for name in ("pip", "source", "ruff", "mypy", "cd")}


@pytest.mark.parametrize("command", [*COMMANDS, *header_commands()], ids=str)
def test_a_command_is_understood(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.words[0] in HANDLERS, "neither run nor known"
    HANDLERS[command.words[0]](command, tmp_path, capsys)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda file: file.name)
def test_the_other_concept_of_a_header_is_accepted(file: Path) -> None:
    from fastunlearn.config import load_config

    found = re.search(r"^#.* Another \w+: (--concepts [^.;\n]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    load_config(str(file), shlex.split(found[1]))


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 40


def test_every_block_says_what_it_is() -> None:
    """A block without a language would be looked at by nobody."""
    languages = {"bash", "python", "toml", "text"}
    assert not [str(block) for block in blocks() if block.language not in languages]


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_toml_is_a_configuration(block: Block, tmp_path: Path) -> None:
    from fastunlearn.config import load_config

    file = tmp_path / "run.toml"
    file.write_text(block.text, encoding="utf-8")
    load_config(str(file), [] if "concepts" in file.read_text() else ["--concepts", "cat"])


def shown(command: Command, folder: Path) -> list[list[str]]:
    """The cells of the rows of means that a ``--show`` of README prints."""
    done = subprocess.run([sys.executable, *command.words[1:]], cwd=folder, capture_output=True, text=True, check=True)
    return [
        [cell.strip(" *") for cell in line.split("|")[1:]] for line in done.stdout.splitlines() if "mean of" in line
    ]


def test_readmes_tables_are_those_of_their_commands() -> None:
    """Their rows hold the means that the commands print."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    now, before = (c for c in COMMANDS if c.block.page == "README.md" and "--show" in c.words)
    means = {kind: cells for _, kind, _, *cells in shown(now, ROOT)}
    rows = re.findall(r"^\| (\w+s, mean of \d+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == len(means) == 2
    for kind, cells in rows:
        evaluations, *scores = cells.split(" | ")
        assert [evaluations.replace(",", ""), *scores] == means[kind][:5]
    earlier = {}
    for method, kind, _, updates, evaluations, _, ua, ira, cra, *_ in shown(
        before, ROOT / "benchmarks/results/first_edition"
    ):
        earlier[method, kind.split(",")[0], updates] = [evaluations, ua, ira, cra]
    rows = re.findall(r"^\| ([\w-]+), (styles|objects), (\d+) updates \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for method, kind, updates, cells in rows:
        evaluations, *scores = cells.split(" | ")
        assert earlier[method, kind, updates] == [evaluations.replace(",", ""), *scores]


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(((?!https?://)[^)]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{page.name}: {target}"


def test_readme_is_short_and_its_pages_are_in_the_index() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in index]


def test_memory_tables_agree_with_the_headers_of_the_presets() -> None:
    """Which in turn state what ``fastunlearn plan`` says."""
    planned = {}
    for file in (ROOT / "configs").glob("sd*.toml"):
        found = re.search(r"Planned: ([\d.]+) GiB", file.read_text(encoding="utf-8"))
        assert found is not None
        planned[file.stem.replace("_", "-")] = f"{float(found[1]):.1f}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for family, style, thing in re.findall(
        r"^\| `([\w-]+)-\.\.\.` \| .* \| ([\d.]+) GiB \| ([\d.]+) GiB \|$", readme, re.M
    ):
        assert (planned.pop(f"{family}-style"), planned.pop(f"{family}-object")) == (style, thing)
    assert set(planned) == {"sdxl-24gb-nudity", "sdxl-8x80gb", "sdxl-48gb-meta"}
    table = (ROOT / "docs" / "sdxl.md").read_text(encoding="utf-8")
    for name, figure in planned.items():
        row = next(line for line in table.splitlines() if line.startswith("|") and f"`{name}`" in line)
        assert figure in row
