"""A training that is hit by a signal at one moment. Started by test_kills.py; not a test itself.

Usage: killed_worker.py MOMENT SIGNAL RANK [options of train.py]. On the rank, the process sends the signal to itself.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from fastunlearn.utils.environment import prepare_environment

# moment -> module, name in it, whether before or after the call, which call; whether only the first rank comes there
MOMENTS: dict[str, tuple[str, str, str, int, bool]] = {
    "loading": ("fastunlearn.training.setup", "load_pipeline", "before", 1, False),
    "before a step": ("fastunlearn.gradients.guard", "FiniteGuard.allows", "before", 4, False),
    "after an update": ("fastunlearn.training.trainer", "one_update", "after", 5, False),
    "writing the log": ("fastunlearn.training.recorder", "Recorder.flush", "before", 4, False),
    "a checkpoint begins": ("fastunlearn.training.checkpoint", "new_folder", "after", 2, True),
    "a checkpoint is half written": ("fastunlearn.training.checkpoint", "_save_parts", "after", 2, False),
    "a checkpoint has no name yet": ("fastunlearn.training.checkpoint", "finish", "before", 2, True),
    "the old checkpoint still there": ("fastunlearn.training.checkpoint", "drop_older", "before", 2, True),
    "the old checkpoint half gone": ("fastunlearn.training.checkpoint_files", "remove", "before", 2, True),
    "the weights on the disk": ("fastunlearn.training.trainer", "keep_weights", "after", 1, True),
    "the U-Net half written": ("fastunlearn.utils.files", "swap", "before", 1, True),
    "the card": ("fastunlearn.export.results", "write_card", "before", 1, True),
}


def hit_at(moment: str, signum: int) -> None:
    """Let this process send itself the signal when it comes there."""
    module, path, when, count, _ = MOMENTS[moment]
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def hit(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        due = calls == count
        if due and when == "before":
            os.kill(os.getpid(), signum)
        result = real(*arguments, **options)
        if due and when == "after":
            os.kill(os.getpid(), signum)
        return result

    setattr(owner, name, hit)


if __name__ == "__main__":
    asked, number, rank, *options = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        launched = "RANK" in os.environ
        prepare_environment(1)
        hit_at(asked, int(number))
        if not launched:  # for the program itself to find that it is alone
            del os.environ["RANK"]
    from fastunlearn.train import main

    sys.exit(main(options))
