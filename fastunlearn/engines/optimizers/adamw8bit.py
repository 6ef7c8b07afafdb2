"""bitsandbytes' AdamW with 8-bit moments; norms and biases keep 32 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastunlearn.engines.optimizers.base import OptimizerSpec, adam_options
from fastunlearn.schema.sections import OptimizerConfig
from fastunlearn.utils.memory_rows import FP32

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# bitsandbytes' own rules; the kernels' format has its QUANT_BLOCK, and which tensors are kept apart is said in
# models/parameter_names.py.
STATE_BLOCK = 256  # elements that share an absmax
SMALLEST_IN_8_BIT = 4096  # elements; the state of smaller tensors has 32 bits


class AdamW8bit(OptimizerSpec):
    """Facts and construction."""

    name = "adamw8bit"
    package = "bitsandbytes"
    has_second_moment = True
    fused_bits: int | None = 8
    offload_refusal = (
        "zero.offload_optimizer: 'cpu' would step 8-bit state on the CPU, where bitsandbytes has no fast path; "
        "use optimizer.name 'adamw', or 'none' with 'paged_adamw8bit'"
    )
    dequantized_bytes = 8 + 2 * FP32  # codes as int64, and two fp32 products

    def build(self, groups: list[dict], config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
        """bitsandbytes' own."""
        import bitsandbytes as bnb  # slow to import, so only where it is asked for

        return bnb.optim.AdamW8bit(groups, **adam_options(config, learning_rate))

    def after_sharding(self, flat_groups: list[Tensor], groups: list[dict]) -> None:
        """Tell bitsandbytes to keep 32-bit state for the flat partitions that hold norms and biases.

        The override is keyed by tensor identity, so it must name the flat partitions that exist after
        ``deepspeed.initialize``, not the parameters that were handed in.
        """
        import bitsandbytes as bnb

        manager = bnb.optim.GlobalOptimManager.get_instance()
        for flat, group in zip(flat_groups, groups, strict=True):
            if group["bits"] == 32:
                manager.override_config(flat, "optim_bits", 32)

    def second_moment(self, state: dict[str, Any]) -> Tensor:
        """From codes and their blocks' scales; small tensors have it as it is."""
        codes = state["state2"]
        if not codes.dtype.is_floating_point:
            values = state["qmap2"].to(codes.device)[codes.reshape(-1).long()]
            return values * state["absmax2"].repeat_interleave(STATE_BLOCK)[: values.numel()]
        return codes

    def state_bytes(self, numel: int, bits: int, sharded: bool) -> tuple[int, int]:
        """Two moments, and a scale for each of their blocks."""
        moments, scales = self._moments(numel, bits, sharded)
        return moments + scales, 0

    def _moments(self, numel: int, bits: int, sharded: bool) -> tuple[int, int]:
        # At stage 0 the parameters are stepped as they are, and nobody overrides bitsandbytes' own rule.
        if numel < SMALLEST_IN_8_BIT or (bits == 32 and sharded):
            return 2 * numel * FP32, 0
        return 2 * numel, 2 * FP32 * -(-numel // STATE_BLOCK)


SPEC = AdamW8bit()
