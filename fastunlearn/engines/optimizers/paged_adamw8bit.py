"""bitsandbytes' 8-bit AdamW whose moments are paged to host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastunlearn.engines.optimizers.adamw8bit import AdamW8bit
from fastunlearn.engines.optimizers.base import adam_options
from fastunlearn.schema.sections import OptimizerConfig

if TYPE_CHECKING:
    import torch

SMALLEST_PAGED = 100_000  # elements


class PagedAdamW8bit(AdamW8bit):
    """Facts and construction: those of the 8-bit AdamW, and the paging."""

    name = "paged_adamw8bit"
    needs_gpu = True
    fused_bits = None
    offload_refusal = (
        "zero.offload_optimizer: 'cpu' and optimizer.name 'paged_adamw8bit' both move the state to host memory; "
        "use 'none' with the paged optimizer, or optimizer.name 'adamw'"
    )

    def build(self, groups: list[dict], config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
        """bitsandbytes' own."""
        import bitsandbytes as bnb  # slow to import, so only where it is asked for

        return bnb.optim.PagedAdamW8bit(groups, **adam_options(config, learning_rate))

    def state_bytes(self, numel: int, bits: int, sharded: bool) -> tuple[int, int]:
        """Large tensors' moments go to the host; never their scales."""
        moments, scales = self._moments(numel, bits, sharded)
        return (scales, moments) if numel >= SMALLEST_PAGED else (moments + scales, 0)


SPEC = PagedAdamW8bit()
