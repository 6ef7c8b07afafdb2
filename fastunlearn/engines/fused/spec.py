"""The facts of the fused engine: its settings, what it refuses, what it advises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastunlearn.engines.base import Engine, EngineSpec
from fastunlearn.engines.optimizers.base import smallest_fused
from fastunlearn.errors import UserError
from fastunlearn.schema.fields import ConfigModel, Offload

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastunlearn.config import Config
    from fastunlearn.utils.distributed import World
    from fastunlearn.utils.memory_rows import Row, Sizes


class FusedConfig(ConfigModel):
    """The fused engine: one GPU, no sharding, no whole gradient."""

    offload_optimizer: Offload = "none"
    """Keep the optimizer's moments in host memory and bring them layer by layer."""


class FusedSpec(EngineSpec):
    """One GPU; the largest gradient that is ever held is that of one layer."""

    name = "fused"
    Settings = FusedConfig

    def title(self, cfg: Config) -> str:
        """It has no variants."""
        return "fused engine"

    def holds_bf16(self, cfg: Config) -> bool:
        """Its steps round stochastically, without fp32 masters."""
        return True

    def needs_process_group(self, cfg: Config) -> bool:
        """It knows no other rank."""
        return False

    def build(self, unet: nn.Module, cfg: Config, world: World, originals: Mapping[str, Tensor]) -> Engine:
        """It needs no originals: what bf16 cut off is put back when the weights are exported."""
        from fastunlearn.engines.fused.engine import FusedEngine

        return FusedEngine(unet, cfg, world)

    def memory_rows(self, cfg: Config, sizes: Sizes, world_size: int) -> list[Row]:
        """Of the one rank."""
        from fastunlearn.engines.fused.memory import fused_rows

        return fused_rows(cfg, sizes)

    def refuse(self, cfg: Config) -> None:
        """What needs all gradients at once."""
        if cfg.train.gradient_accumulation_steps > 1:
            raise UserError(
                f"train.gradient_accumulation_steps: {cfg.train.gradient_accumulation_steps}, but engine 'fused' uses "
                "every gradient as it comes; use 1 and a larger train.train_batch_size, or engine 'zero'"
            )
        if cfg.retains and cfg.surgery.granularity != "tensor":
            raise UserError(
                f"surgery.granularity: {cfg.surgery.granularity!r} needs all gradients at once, which engine 'fused' "
                "never has; use 'tensor', or engine 'zero'"
            )
        if cfg.retains and cfg.surgery.projection == "released" and cfg.train.max_grad_norm > 0:
            raise UserError(
                "surgery.projection: 'released' clips before it projects, by a norm that engine 'fused' does not have "
                "yet; set train.max_grad_norm to 0, or use engine 'zero'"
            )
        if cfg.optimizer_spec.fused_bits is None:
            raise UserError(
                f"optimizer.name: {cfg.optimizer.name!r} is for engine 'zero'; with 'fused' use "
                f"{smallest_fused()!r} and fused.offload_optimizer 'cpu'"
            )
        if cfg.zero.stage > 1 or cfg.zero.offload_optimizer != "none" or cfg.zero.grad_accum_dtype != "auto":
            raise UserError("zero: its settings do not apply to engine 'fused'; drop them, or use engine 'zero'")
        if cfg.has_meta and cfg.train.max_grad_norm > 0:
            raise UserError(
                f"train.max_grad_norm: {cfg.train.max_grad_norm} with the meta term under engine 'fused', which would "
                "clip two gradients by the norm of one; use 0, or engine 'zero'"
            )

    def refuse_ranks(self, cfg: Config, world_size: int) -> None:
        """It has one."""
        if world_size > 1:
            raise UserError(f"num_gpus: {world_size} ranks, and engine 'fused' has one; use 1, or engine 'zero'")

    def offload(self, cfg: Config) -> Sequence[tuple[str, Any]]:
        """Layer by layer."""
        return () if cfg.fused.offload_optimizer != "none" else [("fused.offload_optimizer", "cpu")]

    def instead(self, cfg: Config, world_size: int) -> Sequence[tuple[str, Any]]:
        """On one rank, with the smallest moments."""
        if world_size != 1:
            return ()
        fields: list[tuple[str, Any]] = [("engine", "fused")]
        fields += [("zero.stage", 1)] if cfg.zero.stage > 1 else []
        fields += [("optimizer.name", smallest_fused())] if cfg.optimizer.name != smallest_fused() else []
        return fields


SPEC = FusedSpec()
