"""The DeepSpeed configuration that follows from a run's: users write no DeepSpeed JSON. Nothing here imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastunlearn.config import Config

NEVER = 10**9  # DeepSpeed's own progress lines; the trainer prints its own


def deepspeed_config(cfg: Config, world_size: int) -> dict[str, Any]:
    """The dict for ``deepspeed.initialize(config=...)``; deterministic, and complete enough to need no file beside it.

    With bf16 the gradients are accumulated in bf16, as sharded, unless fp32 is asked for. At stage 1 that is refused:
    DeepSpeed 0.19 would silently switch to ``BF16_Optimizer``, which keeps full fp32 gradients on every rank.
    """
    train = cfg.train
    result: dict[str, Any] = {
        "train_batch_size": train.train_batch_size * train.gradient_accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": train.train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": 0.0,  # ``gradients.Clip`` is the only owner: it knows the norm after all other transforms
        "zero_optimization": _zero(cfg),
        # bitsandbytes is not on DeepSpeed's list of tested optimizers, and offload would insist on DeepSpeedCPUAdam,
        # which compiles C++ at start-up.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }
    if cfg.bf16_weights:
        result["bf16"] = {"enabled": True}
        result["data_types"] = {"grad_accum_dtype": "bf16"}
    if cfg.zero.grad_accum_dtype == "fp32":
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def _zero(cfg: Config) -> dict[str, Any]:
    if cfg.zero.stage == 0:
        return {"stage": 0}
    zero: dict[str, Any] = {
        "stage": cfg.zero.stage,
        "reduce_bucket_size": cfg.zero.reduce_bucket_size,
        "overlap_comm": cfg.zero.overlap_comm,
        "contiguous_gradients": True,
    }
    if cfg.zero.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": cfg.zero.offload_optimizer}
    return zero
