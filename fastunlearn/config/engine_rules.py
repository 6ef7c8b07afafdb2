"""Rules about what trains: the engine, its optimizer, and how the teacher is stored.

What this is: refusals of combinations, each with the remedy. What this is not: the other rules (``config_rules.py``).
"""

from __future__ import annotations

from fastunlearn.config.base import RunConfig
from fastunlearn.errors import UserError


def check_engine(cfg: RunConfig) -> None:
    """Refuse what the engine cannot do.

    Raises:
        UserError: the first rule that is broken.
    """
    if cfg.engine == "fused":
        _check_fused(cfg)
    else:
        _check_zero(cfg)
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
    if cfg.engine == "fused" and world_size > 1:
        raise UserError(f"num_gpus: {world_size} ranks, and engine 'fused' has one; use 1, or engine 'zero'")
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
    if cfg.model.compile != "no" and cfg.teacher.storage in ("int8", "fp8"):
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
    if cfg.model.mixed_precision == "bf16" and not cfg.bf16_weights:
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


def _check_fused(cfg: RunConfig) -> None:
    if cfg.train.gradient_accumulation_steps > 1:
        raise UserError(
            f"train.gradient_accumulation_steps: {cfg.train.gradient_accumulation_steps}, but engine 'fused' uses "
            "every gradient as it comes; use 1 and a larger train.train_batch_size, or engine 'zero'"
        )
    if cfg.retains and cfg.surgery.granularity != "tensor":
        raise UserError(
            f"surgery.granularity: {cfg.surgery.granularity!r} needs all gradients at once, which engine 'fused' never "
            "has; use 'tensor', or engine 'zero'"
        )
    if cfg.retains and cfg.surgery.projection == "released" and cfg.train.max_grad_norm > 0:
        raise UserError(
            "surgery.projection: 'released' clips before it projects, by a norm that engine 'fused' does not have yet; "
            "set train.max_grad_norm to 0, or use engine 'zero'"
        )
    if cfg.optimizer.name == "paged_adamw8bit":
        raise UserError(
            "optimizer.name: 'paged_adamw8bit' is for engine 'zero'; with 'fused' use 'adamw8bit' and "
            "fused.offload_optimizer 'cpu'"
        )
    if cfg.zero.stage > 1 or cfg.zero.offload_optimizer != "none" or cfg.zero.grad_accum_dtype != "auto":
        raise UserError("zero: its settings do not apply to engine 'fused'; drop them, or use engine 'zero'")


def _check_zero(cfg: RunConfig) -> None:
    if cfg.fused.offload_optimizer != "none":
        raise UserError(
            f"fused.offload_optimizer: {cfg.fused.offload_optimizer!r} is for engine 'fused'; with 'zero' set "
            "zero.offload_optimizer"
        )
    _check_optimizer(cfg)


def _check_optimizer(cfg: RunConfig) -> None:
    if cfg.zero.grad_accum_dtype == "fp32" and cfg.model.mixed_precision == "bf16" and cfg.zero.stage == 1:
        raise UserError(
            "zero.grad_accum_dtype: 'fp32' with model.mixed_precision 'bf16' at zero.stage 1 would keep whole fp32 "
            "gradients on every rank; use 'auto', or zero.stage 2 or 3"
        )
    if cfg.zero.offload_optimizer == "none":
        return
    if cfg.zero.stage == 0:
        raise UserError("zero.offload_optimizer: 'cpu' needs sharded state; set zero.stage to 1, 2 or 3, or use 'none'")
    if cfg.optimizer.name == "paged_adamw8bit":
        raise UserError(
            "zero.offload_optimizer: 'cpu' and optimizer.name 'paged_adamw8bit' both move the state to host memory; "
            "use 'none' with the paged optimizer, or optimizer.name 'adamw'"
        )
    if cfg.optimizer.name == "adamw8bit":
        raise UserError(
            "zero.offload_optimizer: 'cpu' would step 8-bit state on the CPU, where bitsandbytes has no fast path; "
            "use optimizer.name 'adamw', or 'none' with 'paged_adamw8bit'"
        )
