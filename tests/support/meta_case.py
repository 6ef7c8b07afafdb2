"""Runs with a meta term on the tiny U-Net, and the same in plain fp64 without engine, kernel or shards. Not a test.

The plain version copies every weight, attacks the copy, and adds up whole gradients: slow, and easy to believe.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from surgery_case import RETAINED, the_pool, trained_names
from tiny import flat, tiny_backbone, tiny_prompts, tiny_rollout, tiny_unet
from tiny_run import tiny_run
from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.denoisers.teacher import Teacher
from fastunlearn.meta.image_sets import MetaSets, QueryBatch
from fastunlearn.meta.objective import MetaObjective
from fastunlearn.methods.tables import build_method
from fastunlearn.models.parameter_names import set_trainable
from fastunlearn.prompts.variants import PromptTable
from fastunlearn.sampling.batch import BatchLayout
from fastunlearn.sampling.image_pool import LatentPool
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.retain import PoolSource, RetainBatch
from fastunlearn.schema.meta import meta_weights
from fastunlearn.training.setup import Run
from fastunlearn.utils.distributed import World

EPSILON, RATE, CLIP, BATCH = 1.0, 30.0, 2e-4, 4  # AdamW's step is linear in the gradient, so that a wrong length shows


@dataclass(frozen=True)
class Case:
    """One way to train with a meta term."""

    name: str
    stage: int = 0
    offload: bool = False
    accumulation: int = 1
    surgery: bool = False
    clip: bool = False
    meta: tuple[tuple[str, Any], ...] = ()
    engine: str = "zero"
    method: str = "kscu"
    """"uce": of an edit that has been made, so that the update is the meta term and what surgery adds."""
    rho: float = 0.0
    tolerance: float = 1e-4


ASCENT = (("inner_optimizer", "sgd"), ("inner_learning_rate", 0.05), ("inner_steps", 2))
ADAMW = (("inner_learning_rate", 1e-3), ("inner_steps", 2))
CASES = (
    Case("stage0", meta=ASCENT),
    Case("stage1-k2-clip", 1, accumulation=2, clip=True, meta=ASCENT),
    Case("stage2-surgery-clip", 2, surgery=True, clip=True, meta=ASCENT),
    Case("stage2-offload-surgery-k2", 2, True, 2, surgery=True, meta=ASCENT),
    Case("stage1-every-2-clip", 1, clip=True, meta=(*ASCENT, ("every", 2))),
    Case("stage1-erased", 1, meta=(*ASCENT, ("forbidden_loss", "erased"))),
    Case("stage2-erased-beyond", 2, meta=(*ASCENT, ("forbidden_loss", "erased"), ("negative_guidance", 1.5))),
    Case("stage2-released", 2, meta=(*ASCENT, ("coefficients", "released"))),
    Case("stage1-trained-scope-key", 1, meta=(*ASCENT, ("inner_scope", "trained"), ("timesteps", "key"))),
    # A step of a fresh AdamW is the gradient's sign, which is anybody's where the gradient is next to nothing.
    Case("stage2-adamw", 2, meta=ADAMW, tolerance=2e-2),
    Case("stage1-after-an-edit-clip", 1, clip=True, meta=ASCENT, method="uce"),
    Case("stage2-after-an-edit-surgery-k2", 2, accumulation=2, surgery=True, meta=ASCENT, method="uce", rho=1.5),
    Case("stage1-goes-on", 1, meta=(*ASCENT, ("restart_every", 2))),
    Case("stage2-every-2-goes-on-adamw", 2, meta=(*ADAMW, ("restart_every", 3), ("every", 2)), tolerance=2e-2),
)


def config_of(case: Case, world_size: int) -> Config:
    per_rank = BATCH // world_size
    published = {"forbidden_loss": "ascent", "negative_guidance": 0.0, "restart_every": 1}
    meta = {"enabled": True, **published, "batch_size": per_rank, "inner_batch_size": per_rank, "num_images": 8}
    weights = {"forbidden_weight": 0.05, "related_weight": 0.03, "unrelated_weight": 0.02}
    return Config.model_validate(
        {
            "concepts": ["neon style"],
            "method": case.method,
            "engine": case.engine,
            "train": {
                "max_train_steps": 3, "train_batch_size": per_rank // case.accumulation, "learning_rate": RATE,
                "gradient_accumulation_steps": case.accumulation, "max_grad_norm": CLIP if case.clip else 0.0,
            },
            "kscu": {"start": 0, "uncond_gradient": False, "ema_decay": 0.0},
            "prompts": {"augment_fraction": 0.0},
            "sampler": {"num_inference_steps": 10},
            "optimizer": {"adam_epsilon": EPSILON},
            "zero": {
                "stage": case.stage, "reduce_bucket_size": 3000,
                "offload_optimizer": "cpu" if case.offload else "none",
            } if case.engine == "zero" else {},
            "model": {"attention": "eager"},
            "surgery": {
                "enabled": case.surgery, "rho": case.rho, "retain_dtype": "auto" if case.engine == "zero" else "fp32",
            },
            "retain": {"batch_size": per_rank // case.accumulation, "target": "noise"},
            "meta": {**meta, **weights, "related_prompts": RETAINED[:1], **dict(case.meta)},
        }
    )  # fmt: skip


def the_prompts() -> PromptTable:
    prompt_table = tiny_prompts()
    return PromptTable(prompt_table.variants, prompt_table.augmented, RETAINED)


def the_sets() -> dict[str, LatentPool]:
    draw = torch.Generator().manual_seed(11)
    prompts = {"forbidden": ["neon style"], "related": RETAINED[:1], "unrelated": RETAINED[1:]}
    return {
        name: LatentPool(torch.randn(8, 4, 8, 8, generator=draw), [own[i % len(own)] for i in range(8)])
        for name, own in prompts.items()
    }


def build_run(case: Case, world: World) -> Run:
    cfg = config_of(case, world.world_size)
    run = tiny_run(cfg, world, the_prompts(), trained_names(tiny_unet()), the_pool() if case.surgery else None)
    if cfg.has_meta:
        sets = MetaSets(cfg, run.models, the_prompts(), world, the_sets())
        run.meta = MetaObjective(cfg, run.models, sets, run.engine, world)
    return run


@cache
def reference(case: Case) -> tuple[Tensor, Tensor]:
    """Trained weights at the start and at the end, flat, by plain means."""
    plain = replace(case, stage=0, offload=False, accumulation=1, engine="zero")
    cfg, prompt_table = config_of(plain, 1), the_prompts()
    backbone = tiny_backbone(prompt_table)
    unet = backbone.unet.double()
    backbone.embeds = backbone.embeds.to(torch.device("cpu"), torch.float64)
    names = trained_names(unet)
    set_trainable(unet, names)
    models = Predictors(backbone, unet, unet, Teacher(unet, names, whole_copy=True))
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    start = flat(trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0, eps=EPSILON)
    rollout = tiny_rollout(models, prompt_table, BatchLayout(0, 1, BATCH, 1), steps=10)
    retain = PoolSource(cfg, models, prompt_table, BatchLayout(0, 1, BATCH, 1), the_pool())
    sets = MetaSets(cfg, models, prompt_table, World(0, 1, torch.device("cpu")), the_sets())
    method = build_method(cfg)
    attacker: dict[str, Any] = {}
    for step in method.table():
        if step.restart:
            rollout.restart(step)
        timestep = rollout.timesteps[step.index]
        if step.update % (cfg.meta.every * cfg.meta.steps_per_attack) == 0:
            attacker.clear()
        m = meta_gradient(cfg, models, sets, step, timestep, attacker) if step.update % cfg.meta.every == 0 else {}
        if cfg.closed_form:
            u, pair = {name: torch.zeros_like(p) for name, p in trained.items()}, None
        else:
            (window,) = rollout.batches(step, None)
            outcome = method.loss(models, window)
            assert outcome.loss is not None
            u, pair = gradients(outcome.loss, trained), outcome.guided
        if case.surgery:
            (kept,) = retain.batches(step, timestep)
            r = gradients(error(models, unet, kept), trained)
            dots = {name: float((u[name] * r[name]).sum()) for name in u}
            c = {name: min(0.0, dots[name]) / float(r[name].square().sum()) - case.rho for name in u}
            u = {name: u[name] - c[name] * r[name] for name in u}
        total = {name: u[name] + m.get(name, 0.0) for name in u}
        norm = math.sqrt(sum(float(g.square().sum()) for g in total.values()))
        for name, parameter in trained.items():
            parameter.grad = total[name] * (min(1.0, CLIP / (norm + 1e-6)) if case.clip else 1.0)
        optimizer.step()
        if step.continues and pair is not None:
            rollout.advance(step, [pair])
    return start, flat(trained)


def meta_gradient(
    cfg: Config, models: Predictors, sets: MetaSets, step: KeyStep, timestep: int, attacker: dict[str, Any]
) -> Mapping[str, Tensor]:
    """InnerLoop a copy, take the losses there and here, one set after the other. ``attacker``: what goes on."""
    unet, w = models.sampler, meta_weights(cfg.meta)
    assert isinstance(unet, torch.nn.Module)
    query = sets.query_batch(step, timestep)
    attacked = copy.deepcopy(unet)
    if cfg.meta.inner_scope == "full":
        attacked.requires_grad_(True)
    attack(cfg, models, attacked, sets.attack_batches(step), attacker)
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    there = {name: p for name, p in attacked.named_parameters() if name in trained}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    after, before = (w.after_forbidden, w.after_related, w.after_unrelated), (0.0, w.before_related, w.before_unrelated)
    for number in range(3):
        part, goal = samples(query, number), None
        if not len(part.latents):
            continue
        if number == 0 and not cfg.meta.ascends:
            chosen = query.set_B == 0
            (goal,) = models.frozen(part.latents, part.timesteps, query.anchor.select(chosen))
            (concept,) = models.frozen(part.latents, part.timesteps, part.cond)
            goal = goal + cfg.meta.negative_guidance * (goal - concept)
        found = gradients(error(models, attacked, part, goal), there)
        here = gradients(error(models, unet, part), trained)
        for name in total:
            total[name] += after[number] * found[name] + before[number] * here[name]
    return total


def attack(
    cfg: Config, models: Predictors, unet: torch.nn.Module, batches: list[RetainBatch], attacker: dict[str, Any]
) -> None:
    """SGD, or AdamW's formulas written out, from where the attacker was."""
    rate = cfg.attack_learning_rate
    named = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    zeros = {name: torch.zeros_like(p) for name, p in named.items()}
    gone, first, second = (attacker.get(key, dict(zeros)) for key in ("gone", "first", "second"))
    for name, p in named.items():
        p.data += gone[name]
    start = {name: p.detach() - gone[name] for name, p in named.items()}
    done = attacker.get("steps", 0)
    for number, batch in enumerate(batches, start=done + 1):
        found = gradients(error(models, unet, batch), named)
        for name, p in named.items():
            g = found[name]
            if cfg.meta.inner_optimizer == "sgd":
                p.data -= rate * g
                continue
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            p.data -= rate * (first[name] / (1 - 0.9**number)) / ((second[name] / (1 - 0.999**number)).sqrt() + 1e-8)
    gone = {name: p.detach() - start[name] for name, p in named.items()}
    attacker.update(gone=gone, first=first, second=second, steps=done + len(batches))


def samples(query: QueryBatch, number: int) -> RetainBatch:
    chosen, b = query.set_B == number, query.batch
    assert b.clean is not None and b.noise is not None
    return RetainBatch(b.latents[chosen], b.timesteps[chosen], b.cond.select(chosen), b.clean[chosen], b.noise[chosen])


def weighted(weights: Sequence[float], losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()


def error(models: Predictors, unet: Any, batch: RetainBatch, goal: Tensor | None = None) -> Tensor:
    prediction = models.backbone.predict(unet, batch.latents, batch.timesteps, batch.cond)
    target = batch.noise if goal is None else goal
    assert target is not None
    return (prediction - target).square().mean()


def gradients(loss: Tensor, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}
