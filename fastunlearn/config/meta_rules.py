"""What the meta term cannot be run with."""

from __future__ import annotations

from fastunlearn.config.base import RunConfig
from fastunlearn.config.run_prompts import meta_prompts
from fastunlearn.errors import UserError
from fastunlearn.schema.attention_rules import UNFUSED


def check_meta(cfg: RunConfig) -> None:
    """Refuse what the meta term cannot be run with.

    Raises:
        UserError: the first rule that is broken.
    """
    meta = cfg.meta
    if not meta.enabled:
        return
    if cfg.zero_stage == 3:
        raise UserError(
            "meta.enabled: true at zero.stage 3, where no rank has the weights that the simulated attack changes; use "
            "zero.stage 2, or engine 'fused'"
        )
    if meta.inner_optimizer == "sgd" and cfg.bf16_weights:
        raise UserError(
            "meta.inner_optimizer: 'sgd' on bf16 weights, where most of its steps would be rounded away; use 'adamw', "
            "which rounds stochastically, or model.mixed_precision 'no'"
        )
    if not meta.ascends and cfg.teacher.storage == "cached":
        raise UserError(
            "meta.forbidden_loss: 'erased' asks the frozen model, which teacher.storage 'cached' does without; use "
            "'ascent', or teacher.storage 'int8'"
        )
    half = meta.num_images // 2
    for field, size in (("inner_batch_size", meta.inner_batch_size), ("batch_size", meta.batch_size)):
        if size > half:
            raise UserError(
                f"meta.num_images: {meta.num_images} pictures leave {half} for each half, fewer than meta.{field} "
                f"{size}; ask for at least {2 * size}"
            )
    _check_second_order(cfg)
    meta_prompts(cfg)
    if meta.steps_per_attack > 1 and (meta.inner_scope == "lora" or meta.order == "second"):
        field, value = ("inner_scope", "lora") if meta.inner_scope == "lora" else ("order", "second")
        raise UserError(
            f"meta.restart_every: {meta.restart_every} with meta.{field} {value!r}, where every attack starts from the "
            "weights as they are; use 1"
        )
    if meta.inner_scope == "lora" and cfg.model.compile != "no":
        raise UserError(
            f"meta.inner_scope: 'lora' with model.compile {cfg.model.compile!r}, which does not see adapters that come "
            "and go; use model.compile 'no', or 'full'"
        )


def _check_second_order(cfg: RunConfig) -> None:
    meta = cfg.meta
    if meta.order == "first":
        return
    if meta.inner_optimizer != "sgd" or meta.inner_scope == "lora":
        raise UserError(
            "meta.order: 'second' goes through steps of SGD on the weights; set meta.inner_optimizer 'sgd' and "
            "meta.inner_scope 'full' or 'trained', or meta.order 'first'"
        )
    if cfg.model.mixed_precision != "no" or cfg.model.gradient_checkpointing or cfg.model.compile != "no":
        raise UserError(
            "meta.order: 'second' is for small models in plain fp32; set model.mixed_precision 'no' without gradient "
            "checkpointing or compilation, or meta.order 'first'"
        )
    if cfg.model.attention not in UNFUSED:
        raise UserError(
            f"meta.order: 'second' with model.attention {cfg.model.attention!r}, which has no second derivative; use "
            "'eager' or 'sdpa-math'"
        )
