"""Text that others wrote: what is refused is refused quickly, in a few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastunlearn.config import load_config
from fastunlearn.errors import UserError
from fastunlearn.utils.foreign import Unreadable, json_object, parse_json, parse_toml, read_text, readable


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert json_object(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.toml").write_bytes('\ufeffconcepts = ["cat"]\nseed = 3'.encode())
    assert load_config(str(tmp_path / "a.toml"), []).seed == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5000, "thousands of digits"),
        ("[NaN]", "NaN"),
        ("-Infinity", "-Infinity"),
        ("", "no valid JSON"),
        ("{'a': 1}", "no valid JSON"),
    ],
)
def test_json_that_is_none(text: str, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = " + "[" * 10_000, "nested too deeply"),
        ("a = " + "9" * 5000, "thousands of digits"),
        (".".join("a" * 1000) + " = 1", "200 dots"),
        (".".join(['"\u2028"'] * 1000) + " = 1", "200 dots"),
        (".".join(["'a'"] * 1000) + " = 1", "200 dots"),
        ('s = "" # "\n' + ".".join("a" * 1000) + ' = "1"', "200 dots"),
        ('s = {x = """a"""", ' + ".".join("a" * 1000) + ' = "1"}', "200 dots"),
        ("s = {x = '''a'''', " + ".".join("a" * 1000) + " = '1'}", "200 dots"),
        ("[" + ".".join("a" * 1000) + "]", "200 dots"),
        ("#" * 2**19, "larger than"),
        ("a = 1\na = 2", "Cannot overwrite"),
    ],
)
def test_toml_that_is_none_names_the_file(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        parse_toml(text)
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(UserError, match=rf"--config: .*a.toml' is not valid TOML: .*{reason}"):
        load_config(str(tmp_path / "a.toml"), [])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (f"a = {['A cat.'] * 300}", ["A cat."] * 300),
        ('a = "' + "." * 300 + '"', "." * 300),
        ("a = 'it\"s" + "." * 300 + "'", 'it"s' + "." * 300),
        ('a = """\nsay \\"' + "." * 300 + '"""', 'say "' + "." * 300),
        ("a = 1 # " + "." * 300, 1),
    ],
)
def test_dots_in_strings_and_comments_are_text(text: str, value: Any) -> None:
    assert parse_toml(text) == {"a": value}


@pytest.mark.parametrize("text", ['"""a\n\\', "'''a\n", '"\\', "'a\n", "\"'#"])
def test_strings_that_do_not_end_take_no_time(text: str) -> None:
    """Looking for the end of each anew would take minutes."""
    with pytest.raises(Unreadable):
        parse_toml("a = " + text * (2**18 // len(text) - 2))


def test_other_encodings_and_large_files(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes("ä".encode("latin-1"))
    with pytest.raises(Unreadable, match="not UTF-8"):
        read_text(file)
    file.write_bytes(b"1" * 11)
    with pytest.raises(Unreadable, match="larger than 10 bytes"):
        read_text(file, 10)


def test_an_object_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(Unreadable, match="no JSON object"):
        json_object(tmp_path / "a.json")


def test_arguments_that_are_not_utf8(tmp_path: Path) -> None:
    assert readable(["--concepts", "Käse"]) == ["--concepts", "Käse"]
    with pytest.raises(UserError, match=r"'out\\udcff' is not UTF-8") as error:
        readable(["--output_dir", "out\udcff"])
    str(error.value).encode()
    with pytest.raises(UserError, match="cannot be read"):
        load_config("a\0b.toml", [])
