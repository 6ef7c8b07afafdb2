"""The runs that surgery is tested with, as cases: every way to shard, accumulate and store, on the tiny U-Net.

Not a test itself: ``surgery_worker.py`` trains them under DeepSpeed, and tests in one process.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from tiny import tiny_prompts, tiny_unet
from tiny_run import tiny_run

from fastunlearn.config import Config
from fastunlearn.models.parameter_names import trainable_names
from fastunlearn.prompts.variants import PromptTable
from fastunlearn.sampling.image_pool import LatentPool
from fastunlearn.training.setup import Run
from fastunlearn.utils.distributed import World

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
    batch: int = 4
    """Over all ranks."""
    updates: int = 3

    @property
    def name(self) -> str:
        flags = [f"stage{self.stage}", f"k{self.accumulation}", self.granularity, self.retain_dtype]
        flags += [flag for flag in ("offload", "overlap", "clip") if getattr(self, flag)]
        flags += [flag for flag in (self.precision, self.accumulate) if flag not in ("no", "auto")]
        flags += [f"batch{self.batch}"] if self.batch != 4 else []
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
    half = offloaded | {"precision": "bf16", "accumulate": "fp32"}
    found += [Case(stage=2, clip=True, **(half | {"accumulation": k})) for k in (1, 2)]  # type: ignore[arg-type]
    found += [Case(stage=s, clip=False, extra=(("metric", "optimizer"),), **offloaded) for s in (2, 3)]  # type: ignore[arg-type]
    return list({case.name: case for case in found}.values())


def cases_for_other_worlds() -> list[Case]:
    """A few for one and for three ranks, all clipped, with a batch that both divide."""
    plain = {"overlap": False, "clip": True, "retain_dtype": "auto", "batch": 6}
    return [
        Case(0, False, 1, granularity="tensor", **plain),  # type: ignore[arg-type]
        Case(1, False, 2, granularity="block", **plain),  # type: ignore[arg-type]
        Case(2, False, 1, granularity="tensor", **plain),  # type: ignore[arg-type]
        Case(2, True, 2, granularity="tensor", **plain),  # type: ignore[arg-type]
        Case(3, False, 2, granularity="global", **plain),  # type: ignore[arg-type]
        Case(3, True, 1, granularity="tensor", precision="bf16", **plain),  # type: ignore[arg-type]
    ]


def config_of(case: Case, world_size: int) -> Config:
    surgery = {"enabled": True, "granularity": case.granularity, "retain_dtype": case.retain_dtype}
    return Config.model_validate(
        {
            "concepts": ["neon style"],
            "model": {"mixed_precision": case.precision},
            "train": {
                "max_train_steps": case.updates,
                "train_batch_size": case.batch // world_size // case.accumulation,
                "gradient_accumulation_steps": case.accumulation,
                "learning_rate": case.step[1],
                "max_grad_norm": CLIP if case.clip else 0.0,
            },
            "kscu": {
                "start": 20, "uncond_gradient": False, "ema_decay": 0.0,
                "negative_guidance": 1.0, "negative_guidance_from": 0.0,
            },
            "prompts": {"augment_fraction": 0.0},
            "sampler": {"num_inference_steps": 10},
            "optimizer": {"adam_epsilon": case.step[0]},
            "zero": {
                "stage": case.stage, "overlap_comm": case.overlap, "reduce_bucket_size": 3000,
                "grad_accum_dtype": case.accumulate, "offload_optimizer": "cpu" if case.offload else "none",
            },
            "surgery": surgery | dict(case.extra),
            "retain": {"batch_size": case.batch // world_size // case.accumulation, "target": "noise"},
        }
    )  # fmt: skip


def the_prompts() -> PromptTable:
    prompt_table = tiny_prompts()
    return PromptTable(prompt_table.variants, prompt_table.augmented, RETAINED)


def the_pool() -> LatentPool:
    draw = torch.Generator().manual_seed(3)
    return LatentPool(torch.randn(6, 4, 8, 8, generator=draw), [RETAINED[i % 3] for i in range(6)])


def trained_names(unet: torch.nn.Module) -> list[str]:
    """Cross-attention, and biases of eight and of four elements, so that a partition begins in the middle of a tensor;
    with three ranks neither all of them (4,172 elements) nor any of them alone divides evenly."""
    return [*trainable_names(unet, "attn2"), "conv_in.bias", "conv_out.bias"]


def build_run(case: Case, world: World) -> Run:
    return tiny_run(config_of(case, world.world_size), world, the_prompts(), trained_names(tiny_unet()), the_pool())
