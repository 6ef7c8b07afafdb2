"""Started by DeepSpeed's launcher in test_surgery_matrix.py: a few updates with surgery in every configuration.

Usage: deepspeed --num_gpus 2 tests/surgery_worker.py FOLDER [CASE ... | mutations]; rank 0 writes one file per case.
"mutations" runs those of surgery_mutations.py instead and writes FOLDER/mutation-<number>.safetensors.
"""

from __future__ import annotations

import contextlib
import itertools
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
from surgery_mutations import MUTATIONS, applied
from tiny import tiny_backbone, tiny_book, tiny_rollout

from fastunlearn.backbone import Backbone, set_trainable, trainable_names
from fastunlearn.config import Config
from fastunlearn.methods import build_method
from fastunlearn.predictors import Predictors
from fastunlearn.prompts import PromptBook
from fastunlearn.retain import Pool, PoolSource
from fastunlearn.rollout import Layout
from fastunlearn.surgery import Surgery
from fastunlearn.teacher import Teacher
from fastunlearn.trainer import Run, one_update
from fastunlearn.zero import Engine, World, connect

UPDATES = 3
GLOBAL_BATCH = 4
RETAINED = ["a cat", "a house in ink style", "a tree"]
# With an epsilon far above the gradients' size AdamW's step is linear in the gradient, so that a wrong length shows.
# Weighted dot products would then be plain ones, so those cases have an epsilon of the gradients' own size.
LINEAR, WEIGHTED = (1.0, 30.0), (1e-6, 1e-3)  # epsilon, learning rate
CLIP = 3e-4


@dataclass(frozen=True)
class Case:
    """One way to train; ``tolerance`` bounds |w - reference| / |reference - start|."""

    stage: int
    offload: bool
    accumulation: int
    overlap: bool
    clip: bool
    granularity: str
    retain_dtype: str
    precision: str = "no"
    accumulate: str = "auto"
    extra: tuple[tuple[str, object], ...] = ()

    @property
    def name(self) -> str:
        flags = [f"stage{self.stage}", f"k{self.accumulation}", self.granularity, self.retain_dtype]
        flags += [flag for flag in ("offload", "overlap", "clip") if getattr(self, flag)]
        flags += [flag for flag in (self.precision, self.accumulate) if flag not in ("no", "auto")]
        return "-".join([*flags, *dict(self.extra)])

    @property
    def step(self) -> tuple[float, float]:
        """AdamW's epsilon and learning rate."""
        return WEIGHTED if "metric" in dict(self.extra) else LINEAR

    @property
    def tolerance(self) -> float:
        if "metric" in dict(self.extra):
            return 1e-3
        if self.precision == "bf16":
            return 0.1
        return {"auto": 1e-4, "bf16": 1e-2, "int8": 2e-2}[self.retain_dtype]


def cases() -> list[Case]:
    """Every stage x offload x accumulation x overlap, with clipping, granularity and retain dtype taking turns so that
    each pair of values meets; then the other options once or twice each."""
    granularities, dtypes = ("tensor", "block", "global"), ("auto", "int8", "bf16")
    turns = ((i % 2 == 0, granularities[i % 3], dtypes[i // 3 % 3]) for i in itertools.count())
    found = []
    for stage, offload, accumulation, overlap in itertools.product((0, 1, 2, 3), (False, True), (1, 2), (False, True)):
        if stage == 0 and (offload or overlap):
            continue
        clip, granularity, dtype = next(turns)
        found.append(Case(stage, offload, accumulation, overlap, clip, granularity, dtype))
        clip, granularity, dtype = next(turns)
        found.append(Case(stage, offload, accumulation, overlap, clip, granularity, "auto"))
    plain = {"offload": False, "accumulation": 1, "overlap": False, "granularity": "tensor", "retain_dtype": "auto"}
    for stage in (0, 1, 2, 3):
        found.append(Case(stage=stage, clip=True, precision="bf16", **plain))  # type: ignore[arg-type]
    for stage, precision, accumulation in itertools.product((2, 3), ("no", "bf16"), (1, 2)):
        changed = plain | {"accumulation": accumulation, "precision": precision, "accumulate": "fp32"}
        found.append(Case(stage=stage, clip=True, **changed))  # type: ignore[arg-type]
    extras: list[dict[str, object]] = [{"two_sided": True}, {"rho": 0.5}, {"strength": 0.5}, {"projection": "released"}]
    extras += [{"metric": "optimizer"}, {"retain_ema": 0.5}, {"retain_device": "host"}]
    extras += [{"projection": "none", "rho": 0.5}]
    for stage, options in zip(itertools.cycle((2, 3, 1)), extras):
        extra = tuple(options.items())
        found.append(Case(stage=stage, clip="metric" not in options, extra=extra, **plain))  # type: ignore[arg-type]
    for stage in (0, 1, 2):  # where each keeps AdamW's second moment
        found.append(Case(stage=stage, clip=False, extra=(("metric", "optimizer"),), **plain))  # type: ignore[arg-type]
    offloaded = plain | {"offload": True}
    found += [Case(stage=s, clip=False, extra=(("metric", "optimizer"),), **offloaded) for s in (2, 3)]  # type: ignore[arg-type]
    return list({case.name: case for case in found}.values())


def config_of(case: Case, world_size: int) -> Config:
    surgery = {"enabled": True, "granularity": case.granularity, "retain_dtype": case.retain_dtype}
    return Config.model_validate(
        {
            "concepts": ["neon style"],
            "model": {"mixed_precision": case.precision},
            "train": {
                "max_train_steps": UPDATES,
                "train_batch_size": GLOBAL_BATCH // world_size // case.accumulation,
                "gradient_accumulation_steps": case.accumulation,
                "learning_rate": case.step[1],
                "max_grad_norm": CLIP if case.clip else 0.0,
            },
            "kscu": {"start": 20, "uncond_gradient": False},
            "prompts": {"augment_fraction": 0.0},
            "sampler": {"num_inference_steps": 10},
            "optimizer": {"adam_epsilon": case.step[0]},
            "zero": {
                "stage": case.stage, "overlap_comm": case.overlap, "reduce_bucket_size": 3000,
                "grad_accum_dtype": case.accumulate, "offload_optimizer": "cpu" if case.offload else "none",
            },
            "surgery": surgery | dict(case.extra),
            "retain": {"batch_size": GLOBAL_BATCH // world_size // case.accumulation, "target": "noise"},
        }
    )  # fmt: skip


def the_book() -> PromptBook:
    book = tiny_book()
    return PromptBook(book.variants, book.augmented, RETAINED)


def the_pool() -> Pool:
    draw = torch.Generator().manual_seed(3)
    return Pool(torch.randn(6, 4, 8, 8, generator=draw), [RETAINED[i % 3] for i in range(6)])


def trained_names(unet: torch.nn.Module) -> list[str]:
    """Cross-attention, and a bias of four elements, so that a partition begins in the middle of a tensor."""
    return [*trainable_names(unet, "attn2"), "conv_out.bias"]


def build_run(case: Case, world: World) -> Run:
    """The trainer's own parts around a tiny U-Net."""
    cfg = config_of(case, world.world_size)
    book = the_book()
    backbone: Backbone = tiny_backbone(book)
    half = case.precision == "bf16"
    if half and case.stage > 0:
        backbone.unet.to(torch.bfloat16)
        backbone.embeds = backbone.embeds.to(torch.device("cpu"), torch.bfloat16)
    backbone.autocast = half and case.stage == 0
    unet = backbone.unet.train()
    names = trained_names(unet)
    set_trainable(unet, names)
    teacher = Teacher(unet, names, whole_copy=case.stage == 3)
    engine = Engine(unet, cfg, world)
    models = Predictors(backbone, engine, engine.sampler, teacher)
    layout = Layout(world.rank, world.world_size, cfg.train.train_batch_size, case.accumulation)
    rollout = tiny_rollout(models, book, layout, steps=10)
    method = build_method(cfg)
    run = Run(cfg, world, method, method.table(), models, rollout, engine)
    run.retain = PoolSource(cfg, models, book, layout, the_pool())
    run.surgery = Surgery(cfg.surgery, cfg.train.max_grad_norm, list(engine.named), world, cfg.zero.stage > 0)
    return run


def train_case(case: Case, world: World) -> dict[str, torch.Tensor]:
    run = build_run(case, world)
    for step in run.table:
        if step.restart:
            run.rollout.restart(step)
        one_update(run, step)
    return run.engine.full_weights()


def mutated_case(name: str) -> Case:
    """The case that a mutation names: "stage2-k1-offload"; clipped, per tensor, with an exact retain gradient."""
    stage, accumulation, accumulate = int(name[5]), int(name[8]), "fp32" if name.endswith("fp32") else "auto"
    precision = "bf16" if accumulate == "fp32" else "no"
    return Case(
        stage, name.endswith("offload"), accumulation, False, True, "tensor", "auto", precision, accumulate=accumulate
    )


def main(folder: Path, names: list[str]) -> None:
    world = connect()
    for case in cases() if names != ["mutations"] else []:
        if names and case.name not in names:
            continue
        weights = train_case(case, world)
        if world.is_main:
            save_file(weights, folder / f"{case.name}.safetensors")
    for number, mutation in enumerate(MUTATIONS if names == ["mutations"] else []):
        with applied(mutation, sys.modules[__name__]), contextlib.suppress(LookupError, RuntimeError, AttributeError):
            weights = train_case(mutated_case(mutation.case), world)
            if world.is_main:
                save_file(weights, folder / f"mutation-{number}.safetensors")
    print(f"rank {world.rank} done")


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    main(Path(arguments[0]), arguments[1:])
