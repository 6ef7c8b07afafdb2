"""Python processes that start at once, forked from one that has already imported what the trainer imports.

A kill, a rank and a configuration of its own need a process of their own; the seven seconds in which it would import
torch, DeepSpeed and diffusers prove nothing. Whether a program starts from nothing is for the tests that start it by
`subprocess`. Where there is a GPU, which a forked process could not use, each process is a new one after all.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

IMPORTED = (
    "fastunlearn.cli", "fastunlearn.training.trainer", "fastunlearn.training.memory_check",
    "fastunlearn.engines.zero.engine", "fastunlearn.engines.fused.engine", "deepspeed", "torch.utils.tensorboard",
)  # fmt: skip
PRELOAD = "FASTUNLEARN_TESTS_PRELOAD"


def start(
    words: list[str],
    out: Path,
    err: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    anew: str | None = None,
) -> BaseProcess:
    """What ``python WORDS`` would do, with its output in two files; it leads a process group of its own.

    ``anew``: a package that it imports itself, as the program changes what is read when that is imported.
    """
    arguments = (words, str(cwd or Path.cwd()), dict(env or os.environ), str(out), str(err), anew)
    process = _process(arguments)
    with pytest.MonkeyPatch.context() as patch:
        # The server looks for this module before it is told our path.
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patch.setenv(PRELOAD, "1")
        process.start()
    return process


def run(
    words: list[str],
    folder: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    anew: str | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run([sys.executable, *words])`, with what it printed; ``folder`` takes two files meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    printed = out, err = folder / f"stdout-{time.time_ns()}", folder / f"stderr-{time.time_ns()}"
    process = start(words, out, err, cwd, env, anew)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise subprocess.TimeoutExpired(words, timeout)
    texts = [path.read_text(encoding="utf-8") for path in printed]
    for path in printed:
        path.unlink()
    return subprocess.CompletedProcess(words, process.exitcode, *texts)


def _process(arguments: tuple) -> BaseProcess:
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn").Process(target=_run, args=arguments)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context.Process(target=_run, args=arguments)


def _run(words: list[str], cwd: str, env: dict[str, str], out: str, err: str, anew: str | None) -> None:
    """In the new process: everything that a fresh one would have from its parent, then the program."""
    os.setsid()
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for name in [name for name in sys.modules if name.partition(".")[0] == anew]:
        del sys.modules[name]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, cwd)
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def _import_all() -> None:
    """In the server, once. The environment is each process's own affair, but for what is read at an import."""
    before = dict(os.environ)
    from fastunlearn.utils.environment import prepare_environment

    prepare_environment(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.utils import nvtx

    for name in IMPORTED:
        importlib.import_module(name)
    nvtx.enable_nvtx = False  # DeepSpeed's marks for a profiler that is not there, on every call of a module
    gc.freeze()  # nor need the collector look at the libraries again; DeepSpeed calls it for each engine
    os.environ.clear()
    os.environ.update(before)


if PRELOAD in os.environ:
    _import_all()
