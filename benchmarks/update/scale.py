"""What a run would need on many GPUs, on paper: memory, U-Net evaluations and traffic, by formulas.

The planner's arithmetic for many ranks, and the bytes that ring collectives would send. The planner's memory is held
against one, two and four ranks on a CPU (`tests/planning/test_planning.py`); nothing beyond that has been run.

    python benchmarks/update/scale.py --model path/to/sdxl --markdown output/scale.md

Assumptions: full U-Net, bf16 with fp32 masters, 8-bit moments, gradient checkpointing, 1024 px, one trajectory and one
kept picture a rank, retain gradient in 8 bits, 500 updates a concept, one concept a rank (`train.spread_concepts`; at
stage 3 all ranks share them in turn). Traffic per update and rank: a ring sends (N - 1) / N of a tensor for a
reduce-scatter or an all-gather. Two windows reduce a bf16 gradient each; then bf16 weights are gathered once. At stage
3 they are gathered for every forward and, with checkpointing, twice for every backward pass.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from fastunlearn.utils.environment import prepare_environment  # noqa: E402

if __name__ == "__main__":
    prepare_environment(cpu_threads=1)

from fastunlearn.config import Config  # noqa: E402
from fastunlearn.models.description import describe_model  # noqa: E402
from fastunlearn.planning.plan import make_plan  # noqa: E402
from fastunlearn.planning.unet_calls import count_evaluations  # noqa: E402
from fastunlearn.utils.text import GIB  # noqa: E402
from markdown_table import markdown_table  # noqa: E402

COLUMNS = {
    "gpus": "GPUs", "stage": "ZeRO stage", "gib_per_gpu": "GiB per GPU", "concepts": "concepts", "updates": "updates",
    "evaluations_per_gpu": "U-Net evaluations per GPU", "gb_sent_per_update": "GB sent per update",
}  # fmt: skip
UPDATES = 500
WINDOWS = 2  # what is kept, what is erased


def config(model: str, stage: int, concepts: int) -> Config:
    """The run of the table."""
    return Config.model_validate(
        {
            "concepts": [f"painter {i} style" for i in range(concepts)],
            "keep": ["dog", "house"],
            "model": {
                "pretrained_model_name_or_path": model, "mixed_precision": "bf16", "gradient_checkpointing": True,
            },
            "train": {
                "scope": "full", "resolution": 1024, "spread_concepts": stage < 3,
                "max_train_steps": UPDATES * (concepts if stage == 3 else 1),
            },
            "optimizer": {"name": "adamw8bit"},
            "surgery": {"enabled": True, "rho": 1.0, "retain_dtype": "int8"},
            "retain": {"batch_size": 1},
            "zero": {"stage": stage},
        }
    )  # fmt: skip


def traffic(parameters: int, ranks: int, stage: int, forwards: float) -> float:
    """Bytes that a rank sends in an update."""
    once = 2 * parameters * (ranks - 1) / ranks
    gathers = forwards + 2 * WINDOWS if stage == 3 else 1
    return once * (WINDOWS + gathers)


def row(model: str, stage: int, ranks: int) -> dict:
    """One line of the table."""
    cfg = config(model, stage, ranks)
    plan = make_plan(cfg, ranks, describe_model(cfg))
    count = count_evaluations(cfg, ranks)
    updates = cfg.train.max_train_steps or UPDATES
    # One call holds several conditions of a sample; with one trajectory a rank these are the calls without a gradient.
    forwards = (count.rollout + count.teacher) / 2 / ranks / updates + WINDOWS
    return {
        "gpus": ranks, "stage": stage, "gib_per_gpu": round(plan.device / GIB, 2), "concepts": ranks,
        "updates": updates, "evaluations_per_gpu": count.total // ranks,
        "gb_sent_per_update": round(traffic(sum(plan.sizes.trained), ranks, stage, forwards) / 1e9, 1),
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with unet/config.json")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def main() -> None:
    """Print the table, and write it where asked."""
    args = arguments()
    rows = [row(args.model, stage, gpus) for gpus in args.gpus for stage in args.stages]
    text = markdown_table(list(COLUMNS.values()), [[f"{row[name]:,}" for name in COLUMNS] for row in rows])
    print(text)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
