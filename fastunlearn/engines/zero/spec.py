"""The facts of the ZeRO engine: its settings, what it refuses, what it advises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastunlearn.engines.base import Engine, EngineSpec
from fastunlearn.engines.optimizers.base import offloadable
from fastunlearn.errors import UserError
from fastunlearn.schema.fields import ConfigModel, Offload, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastunlearn.config import Config
    from fastunlearn.utils.distributed import World
    from fastunlearn.utils.memory_rows import Row, Sizes

RANKS = (2, 4, 8)


class ZeroConfig(ConfigModel):
    """How DeepSpeed shards the training state."""

    stage: Literal[0, 1, 2, 3] = 1
    """What is sharded: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""
    offload_optimizer: Offload = "none"
    """Keep the optimizer state in host memory; needs stage 1 or more, and an optimizer that runs there."""
    reduce_bucket_size: PositiveInt = 500_000_000
    """Elements that are reduced at a time."""
    grad_accum_dtype: Literal["auto", "fp32"] = "auto"
    """The type in which gradients are accumulated; auto: that of the computation. fp32 with bf16 needs stage 2 or 3."""
    overlap_comm: bool = False
    """Reduce gradients while the backward pass still runs; needs a second bucket."""


class ZeroSpec(EngineSpec):
    """DeepSpeed, on any number of ranks."""

    name = "zero"
    Settings = ZeroConfig
    shards = True

    def title(self, cfg: Config) -> str:
        """With its stage."""
        return f"ZeRO-{cfg.zero.stage}"

    def stage(self, cfg: Config) -> int:
        """As configured."""
        return cfg.zero.stage

    def holds_bf16(self, cfg: Config) -> bool:
        """From stage 1 on DeepSpeed keeps fp32 masters; at stage 0 the weights stay fp32, under autocast."""
        return cfg.zero_stage > 0

    def build(self, unet: nn.Module, cfg: Config, world: World, originals: Mapping[str, Tensor]) -> Engine:
        """The masters are made from ``originals`` where ``unet`` holds them rounded."""
        from fastunlearn.engines.zero.engine import ZeroEngine

        return ZeroEngine(unet, cfg, world, originals if cfg.bf16_weights else None)

    def memory_rows(self, cfg: Config, sizes: Sizes, world_size: int) -> list[Row]:
        """Of the rank that needs most."""
        from fastunlearn.engines.zero.memory import rows_of_the_largest_rank

        return rows_of_the_largest_rank(cfg, sizes, world_size)

    def gradients_of_one_pass(self, cfg: Config, sizes: Sizes, world_size: int) -> int:
        """Whole ones at stages 0 and 1."""
        from fastunlearn.engines.zero.memory import gradients_of_one_pass

        return gradients_of_one_pass(cfg, sizes, world_size)

    def refuse(self, cfg: Config) -> None:
        """What DeepSpeed or its optimizers cannot do."""
        if cfg.fused.changed_fields():
            raise UserError(
                f"fused.offload_optimizer: {cfg.fused.offload_optimizer!r} is for engine 'fused'; with 'zero' set "
                "zero.offload_optimizer"
            )
        zero = cfg.zero
        if zero.grad_accum_dtype == "fp32" and cfg.model.mixed_precision == "bf16" and zero.stage == 1:
            raise UserError(
                "zero.grad_accum_dtype: 'fp32' with model.mixed_precision 'bf16' at zero.stage 1 would keep whole fp32 "
                "gradients on every rank; use 'auto', or zero.stage 2 or 3"
            )
        if zero.offload_optimizer == "none":
            return
        if zero.stage == 0:
            raise UserError(
                "zero.offload_optimizer: 'cpu' needs sharded state; set zero.stage to 1, 2 or 3, or use 'none'"
            )
        if cfg.optimizer_spec.offload_refusal is not None:
            raise UserError(cfg.optimizer_spec.offload_refusal)

    def offload(self, cfg: Config) -> Sequence[tuple[str, Any]]:
        """With an optimizer that can be stepped on the host."""
        if cfg.zero.offload_optimizer != "none":
            return ()
        fields: list[tuple[str, Any]] = [("zero.offload_optimizer", "cpu")]
        fields += [("zero.stage", 1)] if cfg.zero.stage == 0 else []
        if cfg.optimizer_spec.offload_refusal is not None:
            fields.append(("optimizer.name", offloadable()))
        return fields

    def more_ranks(self, cfg: Config, world_size: int) -> Sequence[tuple[int, int]]:
        """At stages 2 and 3."""
        return [
            (max(stage, cfg.zero.stage), ranks)
            for stage in (2, 3)
            for ranks in RANKS
            if ranks >= world_size and (ranks > world_size or stage > cfg.zero.stage) and ranks > 1
        ]


SPEC = ZeroSpec()
