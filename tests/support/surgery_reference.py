"""The surgery of a few updates in one plain process, against which the engines are held. Not a test itself.

No DeepSpeed, no kernel and no shards: gradients of the whole batch in fp64, projected tensor by tensor as the formula
says, and torch's AdamW.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from surgery_case import CLIP, Case, config_of, the_pool, the_prompts, trained_names
from tiny import flat, tiny_backbone, tiny_rollout, tiny_unet
from torch import Tensor

from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.denoisers.teacher import Teacher
from fastunlearn.methods.tables import build_method
from fastunlearn.models.parameter_names import set_trainable
from fastunlearn.sampling.batch import BatchLayout
from fastunlearn.sampling.retain import PoolSource


def groups_of(names: list[str], granularity: str) -> dict[str, list[str]]:
    """Which tensors share a coefficient, written out by hand for the tiny U-Net."""
    if granularity == "tensor":
        return {name: [name] for name in names}
    if granularity == "global":
        return {"all": names}
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        groups.setdefault(".".join(parts[:3] if parts[0] == "mid_block" else parts[:4]), []).append(name)
    return groups


def projected(u: dict[str, Tensor], r: dict[str, Tensor], case: Case, v: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The textbook formula, or the variant that the case names, on whole gradients in fp64."""
    options = dict(case.extra)
    released = options.get("projection") == "released"
    strength = 0.0 if options.get("projection") == "none" else float(options.get("strength", 1.0))  # type: ignore[arg-type]
    rho = float(options.get("rho", 0.0))  # type: ignore[arg-type]
    out = dict(u)
    if released and case.clip:
        norm = math.sqrt(sum(float(g.square().sum()) for g in u.values()))
        out = {name: g * min(1.0, CLIP / norm) for name, g in u.items()}
    for members in groups_of(list(u), case.granularity).values():
        metric = {m: torch.ones_like(u[m]) if v is None else 1 / (v[m].sqrt() + case.step[0]) for m in members}
        dot = sum(float((out[m] * r[m] * metric[m]).sum()) for m in members)
        square = sum(float((r[m] * r[m] * metric[m]).sum()) for m in members)
        length = math.sqrt(sum(float(out[m].square().sum()) for m in members))
        wanted = dot if options.get("two_sided") else min(0.0, dot)
        coefficient = 0.0 if square == 0 else strength * wanted / square / (length if released else 1.0)
        for m in members:
            out[m] = out[m] - (coefficient - rho) * r[m]
    if case.clip and not released:
        norm = math.sqrt(sum(float(g.square().sum()) for g in out.values()))
        out = {name: g * min(1.0, CLIP / (norm + 1e-6)) for name, g in out.items()}
    return out


@cache
def reference(clip: bool, granularity: str, extra: tuple, half: str = "", batch: int = 4) -> tuple[Tensor, Tensor]:
    """Start and end of the run in one process, as flat vectors. ``half``: the network computes in bf16, from "sharded"
    bf16 copies of the fp64 weights, or under "autocast"; everything behind its gradient stays fp64."""
    case = Case(0, False, 1, False, clip, granularity, "auto", extra=extra, batch=batch)
    cfg, prompt_table = config_of(case, 1), the_prompts()
    backbone = tiny_backbone(prompt_table, autocast=half == "autocast")
    dtype = {"": torch.float64, "sharded": torch.bfloat16, "autocast": torch.float32}[half]
    unet = backbone.unet.to(dtype)
    backbone.embeds = backbone.embeds.to(torch.device("cpu"), dtype)
    names = trained_names(unet)
    set_trainable(unet, names)
    models = Predictors(backbone, unet, unet, Teacher(unet, names, whole_copy=True))
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    start = tiny_unet().state_dict()
    start = {name: start[name].double() for name in names}
    masters = {name: torch.nn.Parameter(start[name].clone()) for name in trained}
    optimizer = torch.optim.AdamW(masters.values(), lr=case.step[1], weight_decay=0.0, eps=case.step[0])
    layout = BatchLayout(0, 1, batch, 1)
    rollout = tiny_rollout(models, prompt_table, layout, steps=10)
    retain = PoolSource(cfg, models, prompt_table, layout, the_pool())
    method, mean = build_method(cfg), {name: torch.zeros_like(p) for name, p in masters.items()}
    decay = float(dict(extra).get("retain_ema", 0.0))
    for step in method.table():
        if step.restart:
            rollout.restart(step)
        (kept,) = retain.batches(step, rollout.timesteps[step.index])
        (student,) = models.train(kept.latents, kept.timesteps, kept.cond)
        assert kept.noise is not None
        r = gradients((student - kept.noise).square().mean(), trained)
        mean = {name: decay * mean[name] + (1 - decay) * r[name] for name in r}
        (window,) = rollout.batches(step, None)
        outcome = method.loss(models, window)
        assert outcome.loss is not None
        u = gradients(outcome.loss, trained)
        state = {name: optimizer.state[p].get("exp_avg_sq") for name, p in masters.items()}
        weighted = dict(extra).get("metric") == "optimizer" and step.update > 0
        final = projected(u, mean, case, state if weighted else None)
        for name, parameter in masters.items():
            parameter.grad = final[name]
        optimizer.step()
        for name, parameter in trained.items():
            parameter.data.copy_(masters[name].data)
        if step.continues and outcome.guided is not None:
            rollout.advance(step, [outcome.guided])
    return flat(start), flat(masters)


def gradients(loss: Tensor, trained: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(trained.values()))
    return {name: gradient.double() for name, gradient in zip(trained, found, strict=True)}
