"""TOML in and out of a configuration, and what is wrong with one as a single line. The command line: ``options.py``."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import ValidationError

from fastunlearn.config.options import Schema, fields_of, nearest_option
from fastunlearn.errors import UserError, nearest
from fastunlearn.utils.foreign import MAX_TOML_BYTES, Unreadable, parse_toml, read_text


def read_toml(path: str) -> dict[str, Any]:
    """Parse a TOML file; every failure is a ``UserError`` that names the file."""
    file = Path(path).expanduser()
    try:
        return parse_toml(read_text(file, MAX_TOML_BYTES))
    except FileNotFoundError:
        known = [entry.name for entry in file.parent.glob("*.toml")] if file.parent.is_dir() else []
        raise UserError(f"--config: {path!r} does not exist{nearest(file.name, known)}") from None
    except Unreadable as error:
        raise UserError(f"--config: {path!r} is not valid TOML: {error}") from None
    except (OSError, ValueError) as error:  # of a path with a zero byte in it, too
        raise UserError(f"--config: {path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def merge(data: dict[str, Any], flat: dict[str, Any]) -> None:
    """Write ``{"train.scope": "full"}`` into the nested ``data``, in place."""
    for dotted, value in flat.items():
        *sections, leaf = dotted.split(".")
        target = data
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise UserError(f"{section}: {target!r} is not a section; write [{section}] in the TOML file")
        target[leaf] = value


def one_line(error: ValidationError, schema: Schema) -> UserError:
    """The first problem that pydantic found, as one line that names field, value and what is allowed."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    field = _dotted(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return UserError(f"{field}: unknown field{_nearest_field(problem['loc'], schema)}")
    if problem["type"] == "missing":
        return UserError(f"{field}: missing; it has no default")
    annotation = fields[field].annotation if field in (fields := dict(fields_of(schema))) else None
    return UserError(f"{field}: {reprlib.repr(problem['input'])} is not allowed; {_allowed(problem, annotation)}")


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _allowed(problem: Any, annotation: Any) -> str:
    limits = problem.get("ctx", {})
    if problem["type"] == "greater_than" and _is_whole_number(annotation):
        return f"it must be at least {limits['gt'] + 1}"
    texts = {
        "int_type": "a whole number is needed",
        "float_type": "a number is needed",
        "finite_number": "a finite number is needed",
        "bool_type": "true or false is needed",
        "string_type": "text in quotes is needed",
        "list_type": 'a list is needed, such as ["a", "b"]',
        "model_type": "a section with fields is needed" if len(problem["loc"]) == 1 else "a name or a table is needed",
        "too_short": "at least {min_length} entry is needed",
        "literal_error": "allowed are {expected}",
        "greater_than": "it must be greater than {gt}",
        "greater_than_equal": "it must be at least {ge}",
        "less_than": "it must be less than {lt}",
        "less_than_equal": "it must be at most {le}",
        "multiple_of": "it must be a multiple of {multiple_of}",
    }
    text = texts[problem["type"]].format(**limits) if problem["type"] in texts else str(problem["msg"])
    if problem["type"] == "literal_error" and isinstance(problem["input"], str):
        text += nearest(problem["input"], limits["expected"].replace("'", "").replace(" or ", ", ").split(", "))
    return text.replace("True", "true").replace("False", "false")


def _is_whole_number(annotation: Any) -> bool:
    return annotation is int or any(_is_whole_number(part) for part in get_args(annotation))


def _nearest_field(location: tuple[int | str, ...], schema: Schema) -> str:
    fields = dict(fields_of(schema))
    *parents, leaf = [str(part) for part in location if not isinstance(part, int)]
    if parents == ["concepts"]:
        return nearest(leaf, ("name", "anchor", "kind"))
    prefix = "".join(f"{parent}." for parent in parents)
    siblings = [name.removeprefix(prefix).partition(".")[0] for name in fields if name.startswith(prefix)]
    found = nearest(leaf, siblings)
    if found:
        return found.replace("nearest: ", f"nearest: {prefix}")
    return nearest_option(prefix + leaf, fields).replace("nearest: --", "nearest: ")


def emit_toml(data: dict[str, Any]) -> str:
    """TOML of nested plain values; None, which TOML does not have, is left out. ``tomllib`` reads it back equal."""
    return tomli_w.dumps(_without_none(data))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
