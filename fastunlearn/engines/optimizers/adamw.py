"""torch's AdamW with fp32 moments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastunlearn.engines.optimizers.base import OptimizerSpec, adam_options
from fastunlearn.schema.sections import OptimizerConfig
from fastunlearn.utils.memory_rows import FP32

if TYPE_CHECKING:
    import torch


class AdamW(OptimizerSpec):
    """Facts and construction."""

    name = "adamw"
    has_second_moment = True
    fused_bits = 32
    smaller = "adamw8bit"
    temporary_bytes = 2 * FP32  # AdamW makes two temporaries as large as the group

    def build(self, groups: list[dict], config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
        """The same arithmetic on every world size and stage: one tensor at a time, no multi-tensor variants."""
        import torch

        return torch.optim.AdamW(groups, foreach=False, **adam_options(config, learning_rate))

    def state_bytes(self, numel: int, bits: int, sharded: bool) -> tuple[int, int]:
        """Two moments, and the step."""
        return 2 * numel * FP32 + FP32, 0


SPEC = AdamW()
