"""Makes Triton's interpreter quicker, with the same results: the language is patched once a launch.

The interpreter replaces the functions of `triton.language` before a launch, and does so again before every call of one
jit function by another, which takes a third of the time of our tests and changes nothing: in a launch the functions are
replaced already. Where a version of Triton lacks these names nothing is done.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """For the rest of the process. A second call does nothing."""
    patch_lang, launch = getattr(interpreter, "_patch_lang", None), interpreter.GridExecutor.__call__
    if patch_lang is None or hasattr(launch, "plain"):
        return
    patched: set[int] = set()  # the language modules that are patched in this launch

    def patch_once(fn: Any) -> Any:
        wanted = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if wanted <= patched:
            return None
        patched.update(wanted)
        return patch_lang(fn)

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    launch_afresh.plain = launch  # type: ignore[attr-defined]
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh
