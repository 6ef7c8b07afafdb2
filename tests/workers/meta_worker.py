"""Started by DeepSpeed's launcher in test_meta.py: every case on all ranks; rank 0 writes FOLDER/<case>.safetensors."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
sys.path[:0] = [str(p) for p in (ROOT, ROOT / "kernels", TESTS / "support", TESTS / "workers", TESTS / "mutation")]

from fastunlearn.utils.environment import prepare_environment

prepare_environment(1)

from meta_case import CASES, build_run
from safetensors.torch import save_file
from tiny_run import update_all

from fastunlearn.utils.distributed import disconnect, init_distributed


def main(folder: Path) -> None:
    world = init_distributed()
    for case in CASES:
        run = build_run(case, world)
        update_all(run)
        weights = run.engine.export_weights().trained
        if world.is_main:
            save_file(weights, folder / f"{case.name}.safetensors")
    disconnect()


if __name__ == "__main__":
    main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))))
