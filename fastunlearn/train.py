"""Entry of ``deepspeed fastunlearn/train.py --preset minicanvas-style [--section.field value ...]``.

Parse, check, hold the output folder, connect, train, tear down. Bad input ends in one line and exit status 2, before
torch is loaded. The loop is in ``training/trainer.py``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Started by path, Python puts this folder first: its modules would shadow libraries. Put the source roots there.
    root = Path(__file__).resolve().parent.parent
    sys.path[0:1] = [str(root), str(root / "kernels")]

from fastunlearn.config import Config, config_from_arguments
from fastunlearn.config.concept_rules import said_back
from fastunlearn.errors import UserError
from fastunlearn.training.output_folder import claim, last_words
from fastunlearn.training.preflight import check_all, check_kernels
from fastunlearn.utils.environment import prepare_environment
from fastunlearn.utils.foreign import readable
from fastunlearn.utils.processes import stop
from fastunlearn.utils.processes.ranks import check_port

if TYPE_CHECKING:
    from fastunlearn.export.results import Results


def main(argv: list[str]) -> int:
    """Run a training from command-line arguments; returns the exit status: 0 with all results, 3 where some are
    missing, 2 for bad input, 1 where another rank has died, 128 + N where signal N ended it."""
    cfg = None
    try:
        with stop.listening():
            cfg = config_from_arguments(readable(argv))
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
            cfg.validate_runtime(world_size, has_gpu=gpu_present())
            check_kernels(gpu_present())
            check_port()
            check_all(cfg, output=is_main())
            if is_main():
                print(said_back(cfg))
            return run(cfg, world_size)
    except UserError as error:
        say(f"error: {error}")
        return 2
    except stop.Stopped as stopped:
        say(last_words(stopped, cfg))
        return stopped.status
    except Exception:
        if not stop.lost_peer():
            raise
        print(f"error: {stop.lost_peer()} has died; this rank ends, too", file=sys.stderr)
        return 1


def say(line: str) -> None:
    """To the user, once."""
    if is_main():
        print(line, file=sys.stderr)


def is_main() -> bool:
    """Whether this rank talks to the user."""
    return os.environ.get("RANK", "0") == "0"


def gpu_present() -> bool:
    """Whether there is a CUDA device, without loading torch."""
    return Path("/proc/driver/nvidia/version").exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "0") != ""


def run(cfg: Config, world_size: int) -> int:
    """Hold the output folder and train; returns the exit status. Imports torch, so it comes after every other check."""
    prepare_environment(cfg.train.cpu_threads)
    with claim(cfg, is_main()) as work:
        results = run_in(cfg.model_copy(update={"output_dir": str(work)}), world_size)
        if results is None:
            return 0
        from fastunlearn.export.results import settle

        return settle(cfg, results)


def run_in(cfg: Config, world_size: int) -> Results | None:
    """Train, in the folder where results stay until they are whole; the first rank gets to know what is there."""
    from fastunlearn.training.resuming import find_checkpoint

    resume = find_checkpoint(cfg, world_size, is_main())
    if is_main():
        from fastunlearn.training.memory_check import check_memory

        check_memory(cfg, world_size)
    from fastunlearn.models.text.prompt_lengths import check_words
    from fastunlearn.progress.seen import check_classifier
    from fastunlearn.training.trainer import train
    from fastunlearn.utils.distributed import disconnect, init_distributed, single_process

    check_classifier(cfg)
    if (cut := check_words(cfg)) is not None:
        say(f"warning: {cut}")
    world = init_distributed() if cfg.trains else single_process()
    results = train(cfg, world, resume)
    disconnect()
    return results


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
