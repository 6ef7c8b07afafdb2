"""What help says of a field: its type or choices, meaning, default and aliases."""

from __future__ import annotations

import json
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from fastunlearn.schema.fields import KnownIn

Formatter = partial(RawDescriptionHelpFormatter, max_help_position=8)
"""argparse's own, with the text below each option: names like ``--train.gradient_accumulation_steps`` are long."""

SIGNS = {str: "TEXT", int: "N", float: "X", bool: "{true,false}"}


def field_text(info: FieldInfo, aliases: Sequence[str]) -> str:
    """The field's docstring, its default, and the other names of its option."""
    value = info.get_default(call_default_factory=True)
    default = "none" if value is None else json.dumps(value, ensure_ascii=False)
    also = f"; also {', '.join(aliases)}" if aliases else ""
    return f"{info.description} (default {default}{also})".replace("%", "%%")  # argparse fills in %(...)s


def option_type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What stands for a value of this type: its choices, as argparse writes them, or a sign."""
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
    if names := _names(annotation, metadata):
        return "{" + ",".join(names) + "}"
    if get_origin(annotation) is list:
        return f'"{option_type(get_args(annotation)[0])}; ..."'
    kinds = [plain_type(kind) for kind in get_args(annotation)] or [annotation]
    return next((SIGNS[kind] for kind in kinds if kind in SIGNS), "TEXT")


def plain_type(annotation: Any) -> Any:
    """The type without what ``Annotated`` adds."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _names(annotation: Any, metadata: Sequence[Any]) -> Sequence[str]:
    """The choices of a vocabulary or registry; none for any other type."""
    if get_origin(annotation) is Literal:
        return [str(option).lower() for option in get_args(annotation)]
    checks = [getattr(part, "func", None) for part in metadata]
    return next((check.names for check in checks if isinstance(check, KnownIn)), ())
