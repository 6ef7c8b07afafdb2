"""The ``fastunlearn`` command: ``train``, ``plan``, ``evaluate``, ``relearn``, ``doctor`` and ``minicanvas``.

What this is: dispatch, and the one place where a ``UserError`` becomes ``error: ...`` and exit status 2.
What this is not: work. Torch and the rest are imported by the command that needs them, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fastunlearn import __version__
from fastunlearn.errors import UserError, nearest

COMMANDS = {
    "train": "erase concepts from a model",
    "plan": "say what a run will need of memory, and whether it fits",
    "evaluate": "measure what a run erased and what it kept",
    "relearn": "attack what a run left: how quickly does the concept come back?",
    "doctor": "say what this machine has for a run; make models with random weights",
    "minicanvas": "the embedded model: its folder, pictures from it, rebuilding it",
}
PLAN_USAGE = """usage: fastunlearn plan [--config FILE] [--num_gpus N] [--vram GIB] [--json] [--section.field VALUE ...]

Say what a run will need of memory, before any weights are loaded. All options of `fastunlearn train` are understood.

  --vram GIB   memory of one GPU; by default that of the GPU that is there
  --json       print JSON only"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status."""
    try:
        return run(list(sys.argv[1:] if argv is None else argv))
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
    command, *rest = argv
    if command == "train":
        return train(rest)
    if command == "plan":
        return plan(rest)
    if command == "evaluate":
        return evaluate(rest)
    if command == "relearn":
        return relearn(rest)
    if command == "doctor":
        return doctor(rest)
    if command == "minicanvas":
        return minicanvas(rest)
    raise UserError(f"{command!r}: unknown command; allowed are {', '.join(COMMANDS)}{nearest(command, COMMANDS)}")


def usage() -> str:
    """What ``fastunlearn --help`` prints."""
    rows = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: fastunlearn COMMAND ...   (fastunlearn COMMAND --help, fastunlearn --version)", "", "commands:", *rows]
    )


def train(argv: list[str]) -> int:
    """``fastunlearn train``: in this process, or through DeepSpeed's launcher where more than one rank is asked for."""
    from fastunlearn.config import config_from_arguments
    from fastunlearn.config.loader import take_option
    from fastunlearn.training.preflight import check_all

    text, rest = take_option(argv, "num_gpus")
    ranks = _rank_count(text)
    # A mistake is reported here: at once, and not by every rank.
    config = config_from_arguments(rest)
    check_all(config)
    if ranks > 1:
        gpus = _gpu_count()
        if 0 < gpus < ranks:
            raise UserError(f"--num_gpus: {ranks} ranks, but there are {gpus} GPUs; allowed are 1 to {gpus}")
        config.validate_runtime(ranks, has_gpu=gpus > 0)
        command = launch_command(ranks, rest)
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpus else "cpu")  # found out by itself, it warns
        sys.stdout.flush()
        os.execv(command[0], command)
    from fastunlearn.train import main as train_main

    return train_main(rest)


def launch_command(ranks: int, argv: list[str]) -> list[str]:
    """DeepSpeed's launcher on ``train.py``, by the interpreter that runs now, whatever is first on the PATH."""
    script = Path(__file__).with_name("train.py")
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", str(ranks), str(script), *argv]


def _rank_count(text: str | None) -> int:
    if text is None:
        return 1
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--num_gpus: {text!r} is not allowed; a whole number of at least 1 is needed")
    return int(text)


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def plan(argv: list[str]) -> int:
    """``fastunlearn plan``: options as for ``train``, and ``--vram`` and ``--json``."""
    from fastunlearn.config import config_from_arguments
    from fastunlearn.config.loader import take_option
    from fastunlearn.utils.environment import prepare_environment

    if "--help" in argv or "-h" in argv:
        print(PLAN_USAGE)
        return 0
    text, rest = take_option(argv, "num_gpus")
    ranks = _rank_count(text)
    text, rest = take_option(rest, "vram")
    limit = None if text is None else _gib(text)
    config = config_from_arguments([word for word in rest if word != "--json"])
    prepare_environment(1)
    from fastunlearn.commands.plan import run as run_plan

    return run_plan(config, ranks, limit, as_json="--json" in rest)


def _gib(text: str) -> float:
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 1e6:
        raise UserError(f"--vram: {text!r} is not allowed; give the memory of one GPU in GiB, such as 24")
    return gib


def evaluate(argv: list[str]) -> int:
    """``fastunlearn evaluate --model OUT [--json] [--quick] [--full]``."""
    parser = Parser(prog="fastunlearn evaluate", description=COMMANDS["evaluate"], allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="OUT", help="output_dir of a finished run")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--quick", action="store_true", help="fewer images, wider intervals")
    parser.add_argument("--full", action="store_true", help="also the relearning test (see fastunlearn relearn)")
    args = parser.parse_args(argv)
    from fastunlearn.utils.run_folder import check_results

    check_results(Path(args.model))  # before torch is loaded
    from fastunlearn.commands.evaluate import run as run_evaluation

    return run_evaluation(args)


def relearn(argv: list[str]) -> int:
    """``fastunlearn relearn --model OUT [--attack NAME] [--data NAME] [--steps N,N,...] [--seeds N] [--json] ...``."""
    from fastunlearn.commands import relearn as command

    parser = Parser(prog="fastunlearn relearn", description=COMMANDS["relearn"], allow_abbrev=False)
    command.add_arguments(parser)
    args = parser.parse_args(argv)
    return command.run(args)


def doctor(argv: list[str]) -> int:
    """``fastunlearn doctor [--json] [--make-random KIND DIR ...]``."""
    from fastunlearn.commands import doctor as examination
    from fastunlearn.utils.environment import prepare_environment

    parser = Parser(prog="fastunlearn doctor", description=COMMANDS["doctor"], allow_abbrev=False)
    examination.add_arguments(parser)
    args = parser.parse_args(argv)
    prepare_environment()
    return examination.run(args)


def minicanvas(argv: list[str]) -> int:
    """``fastunlearn minicanvas path | sample | rebuild``."""
    from fastunlearn.commands import minicanvas as commands

    parser = Parser(prog="fastunlearn", allow_abbrev=False)
    commands.add_parser(parser.add_subparsers(required=True, parser_class=Parser))
    return commands.run(parser.parse_args(["minicanvas", *argv]))


if __name__ == "__main__":
    sys.exit(main())
