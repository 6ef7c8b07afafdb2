"""Started by DeepSpeed's launcher in test_speed.py: a few updates of a tiny U-Net with every lever, stage and scope.

Usage: deepspeed --num_gpus 2 speed_worker.py FOLDER; rank 0 writes FOLDER/<stage>-<scope>-<levers>.safetensors.
"""

from __future__ import annotations

import sys
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
from torch import nn

from fastunlearn.acceleration.compilation import apply_channels_last, compile_blocks
from fastunlearn.config import Config
from fastunlearn.models.parameter_names import trainable_names
from fastunlearn.utils.distributed import disconnect, init_distributed

BACKEND = "aot_eager"
LEVERS = ("plain", "both")
ZERO = [(1, "full"), (2, "attn2")]


def pull(unet: nn.Module, levers: str) -> None:
    """Apply the levers of this name, in the order in which a run does."""
    if levers in ("channels_last", "both"):
        assert apply_channels_last(unet) > 0
    if levers in ("compiled", "both"):
        assert compile_blocks(unet, BACKEND) > 0


def config_of(stage: int) -> Config:
    return Config.model_validate(
        {
            "concepts": ["neon style"],
            "surgery": {"enabled": False},
            "model": {"gradient_checkpointing": True},
            "train": {"max_train_steps": 3, "learning_rate": 1e-3},
            "sampler": {"num_inference_steps": 10},
            "zero": {"stage": stage},
        }
    )


def main(folder: Path) -> None:
    world = init_distributed()
    for stage, scope in ZERO:
        for levers in LEVERS:
            run = tiny_run(config_of(stage), world, tiny_prompts(), trainable_names(tiny_unet(), scope))
            pull(run.engine.sampler, levers)
            update_all(run)
            weights = run.engine.export_weights().trained
            if world.is_main:
                save_file(weights, folder / f"{stage}-{scope}-{levers}.safetensors")
    disconnect()


if __name__ == "__main__":
    main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))))
