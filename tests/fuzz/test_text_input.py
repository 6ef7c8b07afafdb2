"""Text from anybody, as configuration, option, command line or caption: success or one line, and nothing is written.

`make fuzz CASES=100000` lets it look at new cases for as long as wanted.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from fastunlearn import cli
from fastunlearn.config import Config, load_config
from fastunlearn.config.options import ALIASES, fields_of
from fastunlearn.errors import UserError
from fastunlearn.prompts.captions import read_captions
from fastunlearn.utils.foreign import Unreadable, json_object, parse_json, parse_toml, readable
from fastunlearn.utils.text import json_text

FIELDS = [name for name, _ in fields_of(Config)]
TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", " ", ",", "a, b", "[", '["', "{}", "none", "true", "nan", "inf", "-1", "1e400", "9" * 5000]),
    st.sampled_from(["\udcff", "\0", "\u202e", "../..", "~", "neon style", "cat", "minicanvas", '"a, b"', "x" * 3000]),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.sampled_from([2**63, -(2**63), 10**400, 1e308])
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12
)


def nothing_but(allowed: type[Exception], act: Callable[[], Any]) -> Any:
    """What it gives, or None where it refuses as it should, in one line that can be printed."""
    try:
        return act()
    except allowed as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 2000
        text.encode()
        return None


def loaded(path: str | None, words: list[str]) -> None:
    """A configuration that is accepted can be written and read again."""
    cfg = nothing_but(UserError, lambda: load_config(path, words))
    if cfg is not None:
        parse_toml(cfg.to_toml())
        cfg.resolved()


@given(st.lists(st.tuples(st.sampled_from([*FIELDS, *ALIASES]), TEXTS), max_size=4))
def test_options(pairs: list[tuple[str, str]]) -> None:
    words = nothing_but(UserError, lambda: readable([f"--{name}={value}" for name, value in pairs]))
    if words is not None:
        loaded(None, ["--concepts", "cat", *words])


@given(st.lists(TEXTS, max_size=5))
def test_command_lines(words: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = cli.main(["plan", *words])
            except SystemExit as ended:  # --help
                status = int(ended.code or 0)
        assert status in (0, 2) and not list(Path(folder).iterdir())
    if status == 2:
        assert err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1


@given(st.dictionaries(st.sampled_from(FIELDS) | TEXTS, TREES, max_size=4))
def test_files_with_other_values(flat: dict[str, Any]) -> None:
    data: dict[str, Any] = {"concepts": ["cat"]}
    for name, value in flat.items():
        *sections, leaf = name.split(".")
        target = data
        for section in sections:
            target = target.setdefault(section, {}) if isinstance(target.get(section, {}), dict) else {}
        target[leaf] = value
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.toml"
        try:
            file.write_text(tomli_w.dumps(data), encoding="utf-8")
        except (TypeError, ValueError):  # no TOML has it
            return
        loaded(str(file), [])


@given(st.binary(max_size=200) | TEXTS.map(lambda text: text.encode("utf-8", "surrogateescape")))
def test_files_of_any_bytes(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "any"
        file.write_bytes(content)
        loaded(str(file), ["--concepts", "cat"])
        nothing_but(Unreadable, lambda: json_object(file))


@given(TREES)
def test_what_we_write_is_json(value: Any) -> None:
    text = json_text(value, None)
    with contextlib.suppress(Unreadable):  # a number of thousands of digits
        parse_json(text)
    assert "NaN" not in text or "NaN" in str(value) or "nan" in str(value).lower()


@given(st.lists(TREES | st.fixed_dictionaries({"file_name": TEXTS, "text": TEXTS}), max_size=3), st.binary(max_size=30))
def test_captions(rows: list[Any], caption: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.png").write_bytes(b"")
        (folder / "a.txt").write_bytes(caption)
        nothing_but(UserError, lambda: read_captions(folder, "images"))
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        nothing_but(UserError, lambda: read_captions(folder, "images"))
        (folder / "metadata.jsonl").write_bytes(caption)
        nothing_but(UserError, lambda: read_captions(folder, "images"))


@pytest.mark.parametrize("depth", [10, 1_000, 100_000])
@pytest.mark.parametrize(("opening", "parse"), [("[", parse_json), ('{"a":', parse_json), ("a = [", parse_toml)])
def test_depths(depth: int, opening: str, parse: Callable[[str], Any]) -> None:
    nothing_but(Unreadable, lambda: parse(opening * depth))
