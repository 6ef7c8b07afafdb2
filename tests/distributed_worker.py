"""Started by DeepSpeed's launcher in test_distributed.py: trains a tiny U-Net for a few updates in every configuration.

Usage: deepspeed --num_gpus 2 tests/distributed_worker.py FOLDER; writes FOLDER/<case>.safetensors, rank 0 only.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from fastunlearn.quiet import prepare_environment

if __name__ == "__main__":
    prepare_environment(1)

import torch
from safetensors.torch import save_file
from tiny import tiny_backbone, tiny_book, tiny_rollout

from fastunlearn.backbone import set_trainable, trainable_names
from fastunlearn.config import Config
from fastunlearn.methods import build_method
from fastunlearn.predictors import Predictors
from fastunlearn.rollout import Layout
from fastunlearn.teacher import Teacher
from fastunlearn.trainer import Run, one_update
from fastunlearn.zero import Engine, World, connect

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


CASES = [
    *(Case(f"stage{stage}", 1e-3, stage) for stage in (0, 1, 2, 3)),
    *(Case(f"stage{stage}-accumulation", 1e-3, stage, batch=1, accumulation=2) for stage in (0, 1, 2, 3)),
    *(Case(f"stage{stage}-clip", 1e-3, stage, clip=1e-4) for stage in (0, 1, 2, 3)),
    *(Case(f"stage{stage}-bf16", 0.2, stage, precision="bf16") for stage in (0, 1, 2, 3)),
    *(Case(f"stage{stage}-8bit", 0.2, stage, optimizer="adamw8bit") for stage in (0, 1, 2, 3)),
    Case("stage2-paged", 0.2, 2, optimizer="paged_adamw8bit"),
    Case("stage2-overlap", 1e-3, 2, overlap=True),
    Case("stage2-offload", 1e-3, 2, offload="cpu"),
    Case("stage3-offload", 1e-3, 3, offload="cpu"),
    Case("stage1-checkpointing", 1e-3, 1, checkpointing=True),
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
            "optimizer": {"name": case.optimizer},
            "zero": {"stage": case.stage, "overlap_comm": case.overlap, "offload_optimizer": case.offload},
        }
    )


def train_case(case: Case, world: World) -> dict[str, torch.Tensor]:
    """The trainer's own parts on a tiny U-Net; returns the trained fp32 weights."""
    cfg = config_of(case)
    book = tiny_book()
    backbone = tiny_backbone(book)
    half = case.precision == "bf16"
    if half and case.stage > 0:
        backbone.unet.to(torch.bfloat16)
        backbone.embeds = backbone.embeds.to(torch.device("cpu"), torch.bfloat16)
    backbone.autocast = half and case.stage == 0
    unet = backbone.unet.train()
    if case.checkpointing:
        unet.enable_gradient_checkpointing()
    names = trainable_names(unet, "attn2")
    set_trainable(unet, names)
    teacher = Teacher(unet, names, whole_copy=case.stage == 3)
    engine = Engine(unet, cfg, world)
    models = Predictors(backbone, engine, engine.sampler, teacher)
    rollout = tiny_rollout(models, book, Layout(world.rank, world.world_size, case.batch, case.accumulation), steps=10)
    method = build_method(cfg)
    run = Run(cfg, world, method, method.table(), models, rollout, engine)
    for step in run.table:
        if step.restart:
            rollout.restart(step)
        one_update(run, step)
        assert engine.grad_norm is not None
    return engine.full_weights()


def main(folder: Path) -> None:
    world = connect()
    for case in CASES:
        weights = train_case(case, world)
        if world.is_main:
            save_file(weights, folder / f"{case.name}.safetensors")
    print(f"rank {world.rank} done")


if __name__ == "__main__":
    main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))))
