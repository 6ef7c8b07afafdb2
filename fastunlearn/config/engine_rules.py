"""Refusals of what an engine, the teacher's storage and the levers of speed cannot do together. What one engine or one
optimizer cannot do stands in its own file."""

from __future__ import annotations

from fastunlearn.config.base import RunConfig
from fastunlearn.errors import UserError


def check_engine(cfg: RunConfig) -> None:
    """Refuse what the engine cannot do.

    Raises:
        UserError: the first rule that is broken.
    """
    cfg.engine_spec.refuse(cfg)
    if cfg.retains and cfg.surgery.metric == "optimizer" and not cfg.optimizer_spec.has_second_moment:
        raise UserError(
            f"surgery.metric: 'optimizer' weighs by a second moment, and {cfg.optimizer.name!r} keeps none; use 'raw'"
        )
    _check_speed(cfg)
    if cfg.train.spread_concepts and cfg.zero_stage == 3:
        raise UserError(
            "train.spread_concepts: true with zero.stage 3, where all ranks must call the U-Net equally often; use "
            "false, or zero.stage 2"
        )
    if cfg.teacher.storage == "cached":
        _check_cached(cfg)
    elif cfg.teacher.storage != "exact" and cfg.zero_stage == 3:
        raise UserError(
            f"teacher.storage: {cfg.teacher.storage!r} is for a teacher that shares the student's frozen tensors; at "
            "zero.stage 3 it is a sharded whole; use 'exact', or another stage"
        )


def check_ranks(cfg: RunConfig, world_size: int) -> None:
    """Refuse more ranks than the engine has.

    Raises:
        UserError: the fused engine with several.
    """
    cfg.engine_spec.refuse_ranks(cfg, world_size)
    if cfg.has_meta and cfg.meta.order == "second" and world_size > 1:
        raise UserError(
            f"num_gpus: {world_size} ranks, and meta.order 'second' does not see the attack of the others; use 1, or "
            "'first'"
        )


def _check_speed(cfg: RunConfig) -> None:
    if cfg.model.compile != "no" and cfg.zero_stage == 3:
        raise UserError(
            f"model.compile: {cfg.model.compile!r} with zero.stage 3, which gathers each module's weights in hooks; "
            "use 'no', or zero.stage 2"
        )
    if cfg.model.compile != "no" and cfg.teacher.in_8_bits:
        raise UserError(
            f"model.compile: {cfg.model.compile!r} with teacher.storage {cfg.teacher.storage!r}, which brings weights "
            "back in hooks; use 'no', or teacher.storage 'exact' or 'cached'"
        )
    if cfg.model.cuda_graphs:
        _check_graphs(cfg)
    if cfg.model.cache_prompt_keys:
        _check_prompt_keys(cfg)
    if cfg.model.channels_last and cfg.zero_stage == 3:
        raise UserError(
            "model.channels_last: true with zero.stage 3, which flattens all weights; use false, or zero.stage 2"
        )


def _check_graphs(cfg: RunConfig) -> None:
    if cfg.zero_stage == 3:
        raise UserError("model.cuda_graphs: true with zero.stage 3, which moves weights about; use false, or stage 2")
    if cfg.method_spec.average(cfg) is not None:
        raise UserError(
            f"model.cuda_graphs: true with method {cfg.method!r}, whose trajectories a running mean of the weights "
            "walks; use false"
        )
    if cfg.autocast:
        raise UserError(
            "model.cuda_graphs: true under autocast, which would record casts of weights that have changed since; set "
            "zero.stage to 1 or 2, or use false"
        )


def _check_prompt_keys(cfg: RunConfig) -> None:
    against = {
        "zero.stage 3, whose teacher is another U-Net": cfg.zero_stage == 3,
        "model.compile 'regional', which would compile every call anew": cfg.model.compile != "no",
        "model.cuda_graphs true, which replays the projections that were recorded": cfg.model.cuda_graphs,
        "model.attention 'eager', which is for comparison": cfg.model.attention == "eager",
    }
    for what, there in against.items():
        if there:
            raise UserError(f"model.cache_prompt_keys: true with {what}; use false")


def _check_cached(cfg: RunConfig) -> None:
    if cfg.method_spec.samples == "anchors":
        raise UserError(
            f"teacher.storage: 'cached' is for methods that train on trajectories; {cfg.method!r} draws its samples "
            "anew in every update; use 'int8' or 'exact'"
        )
    if cfg.retains and cfg.retain.target == "teacher":
        raise UserError(
            "teacher.storage: 'cached' leaves no frozen model for retain.target 'teacher'; set retain.target to "
            "'noise', or use 'int8'"
        )
