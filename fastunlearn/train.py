"""Entry of ``deepspeed fastunlearn/train.py --preset minicanvas-style [--section.field value ...]``.

Parse, check, connect, train, tear down. Bad input ends in one line and exit status 2, before torch is loaded. The loop
is in ``training/trainer.py``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Started by path, Python puts this folder first: its modules would shadow libraries. Put the source roots there.
    root = Path(__file__).resolve().parent.parent
    sys.path[0:1] = [str(root), str(root / "kernels")]

from fastunlearn.config import Config, config_from_arguments
from fastunlearn.errors import UserError
from fastunlearn.training.preflight import check_all, check_kernels
from fastunlearn.utils.environment import prepare_environment
from fastunlearn.utils.foreign import readable


def main(argv: list[str]) -> int:
    """Run a training from command-line arguments; returns the exit status."""
    try:
        cfg = config_from_arguments(readable(argv))
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        cfg.validate_runtime(world_size, has_gpu=gpu_present())
        check_kernels(gpu_present())
        check_all(cfg)
        run(cfg, world_size)
    except UserError as error:
        if is_main():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_main():
            print("interrupted; continue with --resume_from_checkpoint latest", file=sys.stderr)
        return 130
    return 0


def is_main() -> bool:
    """Whether this rank talks to the user."""
    return os.environ.get("RANK", "0") == "0"


def gpu_present() -> bool:
    """Whether there is a CUDA device, without loading torch."""
    return Path("/proc/driver/nvidia/version").exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "0") != ""


def run(cfg: Config, world_size: int) -> None:
    """Join the other ranks and train. Imports torch, so it comes after every check that needs neither."""
    prepare_environment(cfg.train.cpu_threads)
    from fastunlearn.training.resuming import find_checkpoint

    resume = find_checkpoint(cfg, world_size, is_main())
    if is_main():
        from fastunlearn.training.memory_check import check_memory

        check_memory(cfg, world_size)
    from fastunlearn.training.trainer import train
    from fastunlearn.utils.distributed import disconnect, init_distributed, single_process

    world = init_distributed() if cfg.trains else single_process()
    train(cfg, world, resume)
    disconnect()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
