"""Text for people: sizes in bytes, the first line of an error, names of styles."""

from __future__ import annotations

import json
import math
from typing import Any

GIB = 2**30
STYLE = " style"
"""How the name of a style ends."""
ARTICLES = frozenset("a an the one two three some several my your his her their".split())  # noqa: SIM905


def size(count: int) -> str:
    """1.23 GiB, 12.3 MiB, or a dash for nothing."""
    if count == 0:
        return "-"
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.2f} MiB"


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error, for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def names_style(name: str) -> bool:
    """Whether this is how a style is called."""
    return name.lower().endswith(STYLE)


def without_style(name: str) -> str:
    """ "neon style" -> "neon"; any other name as it is."""
    return name.removesuffix(STYLE)


def with_article(name: str) -> str:
    """ "apple" -> "an apple"; a proper name, and what has an article or a number already, stays as it is."""
    first = next(iter(name.split()), "")
    if not first or first in ARTICLES or not first[0].islower():
        return name
    return f"{article_of(name)} {name}"


def article_of(word: str) -> str:
    """ "an" before a vowel, else "a"."""
    return "an" if word[:1] in "aeiou" else "a"


def json_text(value: Any, indent: int | None = 2) -> str:
    """Valid JSON: null where a number is not finite, which JSON cannot say."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
