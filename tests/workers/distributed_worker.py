"""Started by DeepSpeed's launcher in test_distributed.py: trains a tiny U-Net for a few updates in every configuration.

Usage: deepspeed --num_gpus 2 distributed_worker.py FOLDER; writes FOLDER/<case>.safetensors, rank 0 only; with
bf16 also <case>-start (before the first update) and <case>-loaded (from a checkpoint of the end).
"""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
sys.path[:0] = [str(p) for p in (ROOT, ROOT / "kernels", TESTS / "support", TESTS / "workers", TESTS / "mutation")]

from fastunlearn.utils.environment import prepare_environment

if __name__ == "__main__":
    prepare_environment(1)

from safetensors.torch import save_file
from tiny import tiny_prompts, tiny_unet
from tiny_run import tiny_run, update_all

from fastunlearn.config import Config
from fastunlearn.engines.optimizers import groups
from fastunlearn.models.parameter_names import trainable_names
from fastunlearn.training.setup import Run
from fastunlearn.utils.distributed import World, disconnect, init_distributed

UPDATES = 4
WORLD = 2


@dataclass(frozen=True)
class Case:
    """One way to train; ``tolerance`` bounds |w - reference| / |reference - start|."""

    name: str
    tolerance: float
    stage: int = 1
    precision: str = "no"
    optimizer: str = "adamw"
    batch: int = 2
    accumulation: int = 1
    clip: float = 0.0
    overlap: bool = False
    offload: str = "none"
    checkpointing: bool = False
    group_limit: int = groups.MAX_GROUP_NUMEL


CASES = [
    *(Case(f"stage{stage}", 1e-3, stage) for stage in (0, 1, 2, 3)),
    *(Case(f"stage{stage}-accumulation", 1e-3, stage, batch=1, accumulation=2) for stage in (0, 1, 2, 3)),
    *(Case(f"stage{stage}-clip", 1e-3, stage, clip=1e-4) for stage in (0, 1, 2, 3)),
    *(Case(f"stage{stage}-bf16", 0.2, stage, precision="bf16") for stage in (0, 1, 2, 3)),
    *(Case(f"stage{stage}-bf16-offload", 0.2, stage, precision="bf16", offload="cpu") for stage in (1, 2, 3)),
    *(Case(f"stage{stage}-8bit", 0.2, stage, optimizer="adamw8bit") for stage in (0, 1, 2, 3)),
    Case("stage2-paged", 0.2, 2, optimizer="paged_adamw8bit"),
    Case("stage2-overlap", 1e-3, 2, overlap=True),
    Case("stage2-offload", 1e-3, 2, offload="cpu"),
    Case("stage3-offload", 1e-3, 3, offload="cpu"),
    Case("stage1-checkpointing", 1e-3, 1, checkpointing=True),
    Case("stage2-split", 1e-3, 2, group_limit=1000),
]


def config_of(case: Case) -> Config:
    return Config.model_validate(
        {
            "concepts": ["neon style"],
            "model": {"mixed_precision": case.precision, "gradient_checkpointing": case.checkpointing},
            "train": {
                "max_train_steps": UPDATES,
                "train_batch_size": case.batch,
                "gradient_accumulation_steps": case.accumulation,
                "learning_rate": 1e-3,
                "max_grad_norm": case.clip,
            },
            "sampler": {"num_inference_steps": 10},
            "surgery": {"enabled": False},
            "optimizer": {"name": case.optimizer},
            "zero": {"stage": case.stage, "overlap_comm": case.overlap, "offload_optimizer": case.offload},
        }
    )


def build_run(case: Case, world: World) -> Run:
    groups.MAX_GROUP_NUMEL = case.group_limit
    return tiny_run(config_of(case), world, tiny_prompts(), trainable_names(tiny_unet(), "attn2"))


def main(folder: Path) -> None:
    world = init_distributed()
    gc.collect()
    gc.freeze()  # what the libraries have made need not be looked at for every case
    for case in CASES:
        run = build_run(case, world)
        weights = {"-start": run.engine.export_weights().trained} if case.precision == "bf16" else {}
        update_all(run)
        assert run.engine.grad_norm is not None
        weights[""] = run.engine.export_weights().trained
        if case.precision == "bf16":
            run.engine.save(folder / case.name)
            run = build_run(case, world)
            run.engine.load(folder / case.name)
            weights["-loaded"] = run.engine.export_weights().trained
        for what, tensors in weights.items() if world.is_main else ():
            save_file(tensors, folder / f"{case.name}{what}.safetensors")
    disconnect()
    print(f"rank {world.rank} done")


if __name__ == "__main__":
    main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))))
