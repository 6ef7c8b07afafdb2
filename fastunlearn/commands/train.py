"""``fastunlearn train``: a run in this process, or in one for each rank where several are asked for."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from pathlib import Path

import fastunlearn
from fastunlearn.config import config_of, run_options
from fastunlearn.config.options import Option
from fastunlearn.errors import UserError
from fastunlearn.utils.processes.ranks import run_ranks

DESCRIPTION = """\
Erase concepts from a Stable Diffusion or SDXL model:

  fastunlearn train --preset sdxl-24gb-style --pretrained_model_name_or_path my_model.safetensors \\
      --concepts "Van Gogh style" --output_dir output/van_gogh
  fastunlearn train --config my_run.toml --train.max_train_steps 200

Every field of a TOML file is an option. A list is written "A; B", a missing value none, and of two values for one field
the later wins. `deepspeed fastunlearn/train.py` takes the same options, on several GPUs or machines."""
NUM_GPUS = Option("num_gpus", "ranks, each on a GPU of its own, or on CPU cores where there is none (default 1)", "N")


def main(parser: ArgumentParser, argv: list[str]) -> int:
    """Check, so that a mistake is reported at once and not by every rank; then train."""
    from fastunlearn.training.preflight import check_all

    parser.description = DESCRIPTION
    options = run_options(parser, NUM_GPUS)
    given = options.help_or_read(argv)
    ranks = rank_count(given.pop(NUM_GPUS.name, None))
    config = config_of(given)
    check_all(config)
    words = [word for word in options.joined(argv) if not word.startswith(f"--{NUM_GPUS.name}=")]
    if ranks > 1:
        gpus = gpu_count()
        if 0 < gpus < ranks:
            raise UserError(f"--num_gpus: {ranks} ranks, but there are {gpus} GPUs; allowed are 1 to {gpus}")
        config.validate_runtime(ranks, has_gpu=gpus > 0)
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpus else "cpu")  # found out by itself, it warns
        return run_ranks(ranks, [sys.executable, "-u", str(Path(fastunlearn.__path__[0]) / "train.py"), *words])
    from fastunlearn.train import main as train_main

    return train_main(words)


def rank_count(text: str | None) -> int:
    """The value of ``--num_gpus``.

    Raises:
        UserError: it is no number of ranks.
    """
    if text is None:
        return 1
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--num_gpus: {text!r} is not allowed; a whole number of at least 1 is needed")
    return int(text)


def gpu_count() -> int:
    """How many GPUs torch sees."""
    import torch

    return torch.cuda.device_count()
