"""The one exception that is shown to the user as a single line, without a traceback.

Raise it where a person can act on the message; between modules ``ValueError`` stays what it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_LENGTH = 1200


class UserError(Exception):
    """A request that cannot be met. The message is one line: field, bad value, what is allowed, nearest name or remedy.

    The command line prints ``error: <message>`` and exits with status 2. It is deliberately not a ``ValueError``, so
    that pydantic passes it through instead of wrapping it in a validation error.
    """

    def __str__(self) -> str:
        """One line of bounded length that every terminal can show, whatever values the message quotes."""
        text = "".join(sign if sign.isprintable() else f"\\x{ord(sign):02x}" for sign in super().__str__())
        return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH // 2]} ... {text[-MAX_LENGTH // 2 :]}"


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The known name that resembles ``name`` most; "" where none does."""
    by_lower = {option.lower(): option for option in known}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.5)
    return by_lower[found[0]] if found else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message: " (nearest: <known name>)" where a known name resembles ``name``, else nothing."""
    found = nearest_name(name, known)
    return f" (nearest: {found})" if found else ""
