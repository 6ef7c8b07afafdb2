"""The ``fastunlearn`` command: finds the file of a command in ``commands/`` and hands it the rest of the line.

The one place where a ``UserError`` becomes ``error: ...`` and exit status 2. A command imports torch and the like when
it starts to work, so that ``--help`` and refusals are instant.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

from fastunlearn import __version__
from fastunlearn.errors import UserError, nearest
from fastunlearn.utils.foreign import readable


class Command(NamedTuple):
    """A line of ``fastunlearn --help``, and the module that does the work: with ``add_arguments(parser)`` and
    ``run(args)``, or with ``main(parser, argv)`` where the options are made of the configuration's fields."""

    title: str
    module: str


COMMANDS = {
    "train": Command("erase concepts from a model", "fastunlearn.commands.train"),
    "presets": Command("list the bundled configurations, or print one", "fastunlearn.commands.presets"),
    "plan": Command("say what a run will need of memory, and whether it fits", "fastunlearn.commands.plan"),
    "evaluate": Command("measure what a run erased and what it kept", "fastunlearn.commands.evaluate"),
    "relearn": Command(
        "attack what a run left: how quickly does the concept come back?", "fastunlearn.commands.relearn"
    ),
    "doctor": Command(
        "say what this machine has for a run; make models with random weights", "fastunlearn.commands.doctor"
    ),
    "minicanvas": Command(
        "the embedded model: its folder, pictures from it, rebuilding it", "fastunlearn.commands.minicanvas"
    ),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status."""
    try:
        return run(readable(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run(argv: list[str]) -> int:
    """Dispatch to a command.

    Raises:
        UserError: the command or one of its arguments is not known.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"fastunlearn {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        raise UserError(f"{name!r}: unknown command; allowed are {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    command = COMMANDS[name]
    parser = Parser(prog=f"fastunlearn {name}", description=command.title, allow_abbrev=False)
    module = import_module(command.module)
    if hasattr(module, "main"):
        return module.main(parser, rest)
    module.add_arguments(parser)
    return module.run(parser.parse_args(rest))


def usage() -> str:
    """What ``fastunlearn --help`` prints."""
    rows = [f"  {name:<12}{command.title}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: fastunlearn COMMAND ...   (fastunlearn COMMAND --help, fastunlearn --version)", "", "commands:", *rows]
    )


if __name__ == "__main__":
    sys.exit(main())
