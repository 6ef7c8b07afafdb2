"""Which change of the configuration makes a run fit into its GPU.

A fixed list of changes, from the one that costs least to the one that costs most, tried alone and then together until
the plan fits. A smaller scope or batch changes what is learnt; the list says nothing about that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from fastunlearn.config import Config, resolved_scope
from fastunlearn.config.loader import merge
from fastunlearn.errors import UserError
from fastunlearn.models.description import ModelDescription
from fastunlearn.models.parameter_names import SCOPES
from fastunlearn.planning.plan import Plan, make_plan, unet_sizes
from fastunlearn.registry import ENGINES


@dataclass(frozen=True)
class Change:
    """One step: fields to set, or another number of ranks."""

    fields: tuple[tuple[str, Any], ...]
    world: int = 0

    def __str__(self) -> str:
        words = [f"--{name} {str(value).lower()}" for name, value in self.fields]
        return " ".join(([f"--num_gpus {self.world}"] if self.world else []) + words)


def smallest_change(plan: Plan, model: ModelDescription, limit: int) -> Plan | None:
    """The plan of the first change that fits, or else of the changes together that do; None where they do not.

    Together they are added one by one, each where it lowers the peak; then those that turn out not to be needed go.
    """
    changes = list(_changes(plan, model))
    for change in changes:
        alone = apply(plan, model, (change,))
        if alone is not None and alone.fits(limit):
            return alone
    taken: tuple[Change, ...] = ()
    best, before = plan, plan.device + 1
    while best.device < before:  # what did not help at one peak may help at the next
        before = best.device
        for change in (change for change in changes if change not in taken):
            tried = apply(plan, model, (*taken, change))
            if tried is not None and tried.device < best.device:
                taken, best = (*taken, change), tried
            if best.fits(limit):
                return _without_the_needless(plan, model, limit, taken)
    return None


def _without_the_needless(plan: Plan, model: ModelDescription, limit: int, taken: tuple[Change, ...]) -> Plan | None:
    for change in taken[::-1]:  # the last ones cost most
        fewer = tuple(other for other in taken if other != change)
        tried = apply(plan, model, fewer)
        if tried is not None and tried.fits(limit):
            taken = fewer
    return apply(plan, model, taken)


def apply(plan: Plan, model: ModelDescription, changes: tuple[Change, ...]) -> Plan | None:
    """The plan with these changes; None where they contradict each other."""
    data = plan.cfg.model_dump()
    world = plan.world
    for change in changes:
        merge(data, dict(change.fields))
        world = change.world or world
    try:
        cfg = Config.model_validate(data)
        return make_plan(cfg, world, model, changes=tuple(str(change) for change in changes))
    except (UserError, ValidationError):
        return None


def _changes(plan: Plan, model: ModelDescription) -> Iterator[Change]:
    """In the order in which they are tried."""
    cfg = plan.cfg
    yield from _set(cfg.retains and cfg.surgery.retain_dtype != "int8", "surgery.retain_dtype", "int8")
    yield from _set(not cfg.model.gradient_checkpointing, "model.gradient_checkpointing", True)
    smaller = cfg.optimizer_spec.smaller if cfg.engine_spec.offload(cfg) else None
    yield from _set(smaller is not None, "optimizer.name", smaller)
    yield from _set(cfg.model.mixed_precision == "no", "model.mixed_precision", "bf16")
    yield from _other_engines(cfg, plan.world)
    yield from _set(cfg.zero_stage < 3 and cfg.teacher.storage == "exact", "teacher.storage", "int8")
    yield from _offload(cfg)
    yield from _batches(cfg)
    yield from _scopes(cfg, model)
    yield from _ranks(cfg, plan.world)


def _set(wanted: bool, name: str, value: Any) -> Iterator[Change]:
    if wanted:
        yield Change(((name, value),))


def _other_engines(cfg: Config, world: int) -> Iterator[Change]:
    """Another engine, where it takes the configuration as it is (``apply`` finds out)."""
    for name, spec in ENGINES.items():
        fields = spec.instead(cfg, world) if name != cfg.engine else ()
        if fields:
            yield Change(tuple(fields))


def _offload(cfg: Config) -> Iterator[Change]:
    fields = cfg.engine_spec.offload(cfg)
    if fields:
        yield Change(tuple(fields))


def _batches(cfg: Config) -> Iterator[Change]:
    batch, retained = cfg.train.train_batch_size, cfg.retain_batch_size if cfg.retains else 1
    while batch > 1 or retained > 1:
        batch, retained = max(1, batch // 2), max(1, retained // 2)
        fields = [("train.train_batch_size", batch)] if batch != cfg.train.train_batch_size else []
        fields += [("retain.batch_size", retained)] if cfg.retains and retained != cfg.retain_batch_size else []
        yield Change(tuple(fields))


def _scopes(cfg: Config, model: ModelDescription) -> Iterator[Change]:
    def trained(scope: str) -> int:
        return sum(unet_sizes(model, scope).trained)

    now = trained(resolved_scope(cfg))
    for scope in sorted((scope for scope in SCOPES if trained(scope) < now), key=trained, reverse=True):
        yield Change((("train.scope", scope),))


def _ranks(cfg: Config, world: int) -> Iterator[Change]:
    for stage, ranks in cfg.engine_spec.more_ranks(cfg, world):
        yield Change((("zero.stage", stage),), 0 if ranks == world else ranks)
