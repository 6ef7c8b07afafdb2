"""Text that others wrote, JSON and TOML: read within bounds, so that no file takes the memory, the stack or the time.

Every failure is an ``Unreadable`` with a reason in a few words; the caller says which file and what to do.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastunlearn.errors import UserError

MAX_JSON_BYTES, MAX_TOML_BYTES = 64 * 2**20, 2**18
MAX_DOTS = 200
"""On a line of TOML, outside its strings: a key of n parts takes n * n steps to read."""
QUOTED = re.compile(
    r'"""(?:\\.|[^\\])*?(?:"{3,5}|\\?\Z)|'
    r"'''.*?(?:'{3,5}|\Z)|"
    r'"(?:\\.|[^"\\\n])*"?|'
    r"'[^'\n]*'?|"
    r"#[^\n]*",
    re.DOTALL,
)
"""A string or a comment of TOML, whichever begins first. One that does not end takes the rest, which TOML does not
read: so each sign is looked at once."""


class Unreadable(ValueError):
    """The text is not what it should be."""


def read_text(file: Path, limit: int = MAX_JSON_BYTES) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        Unreadable: larger than ``limit`` bytes, or no UTF-8.
        OSError: it cannot be opened.
    """
    with file.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise Unreadable(f"it is larger than {limit:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"it is not UTF-8 (byte {error.start})") from None


def parse_json(text: str) -> Any:
    """JSON, without NaN and infinity, which it does not have.

    Raises:
        Unreadable: it is none, or nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise Unreadable(f"no valid JSON: {error.msg}, line {error.lineno}") from None
    except Unreadable:
        raise
    except ValueError:
        raise Unreadable("it holds a number with thousands of digits") from None


def json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        Unreadable: it holds something else.
        OSError: it cannot be opened.
    """
    content = parse_json(read_text(file))
    if not isinstance(content, dict):
        raise Unreadable("no JSON object")
    return content


def parse_toml(text: str) -> dict[str, Any]:
    """TOML.

    Raises:
        Unreadable: it is none, or nested too deeply, or holds a number of thousands of digits.
    """
    if len(text) > MAX_TOML_BYTES:
        raise Unreadable(f"it is larger than {MAX_TOML_BYTES:,} bytes")
    if any(line.count(".") > MAX_DOTS for line in QUOTED.sub("", text).split("\n")):
        raise Unreadable(f"a line has more than {MAX_DOTS} dots")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise Unreadable(str(error)) from None
    except ValueError:
        raise Unreadable("it holds a number with thousands of digits") from None


def readable(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line.

    Raises:
        UserError: one is not UTF-8: it could be printed and stored nowhere.
    """
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{argument!a} is not UTF-8; rename the file or folder, or check the locale") from None
    return list(arguments)


def _refuse_constant(name: str) -> NoReturn:
    raise Unreadable(f"no valid JSON: {name}")
