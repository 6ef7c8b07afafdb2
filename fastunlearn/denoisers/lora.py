"""Low-rank additions to the attention projections (LoRA, arXiv:2106.09685), as an attacker would train them: one that
is simulated (``meta/``), or one that tests a finished model (``evaluation/attacks/``).

    y = W x + B A x     on every q, k, v and output projection; A random, B zero: at first nothing changes
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastunlearn.models.parameter_names import attention_projections


class LowRank(nn.Module):
    """What is added to one projection."""

    def __init__(self, base: nn.Linear, rank: int, draw: torch.Generator) -> None:
        super().__init__()
        self.base = [base]  # in a list: its weights are not this module's
        down = torch.randn(rank, base.in_features, generator=draw) / rank
        self.down = nn.Parameter(down.to(base.weight.device, base.weight.dtype))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        """B A x."""
        return nn.functional.linear(nn.functional.linear(inputs, self.down), self.up)

    @torch.no_grad()
    def merge(self) -> None:
        """Add it to the projection's own weight for good."""
        self.base[0].weight += self.up @ self.down


@contextmanager
def low_rank(unet: nn.Module, rank: int, seed: int) -> Iterator[list[LowRank]]:
    """Add B A to every attention projection of ``unet`` for as long as the block lasts."""
    draw = torch.Generator().manual_seed(seed)
    added = [LowRank(base, rank, draw) for base in attention_projections(unet) if isinstance(base, nn.Linear)]
    hooks = [pair.base[0].register_forward_hook(lambda _, args, out, pair=pair: out + pair(args[0])) for pair in added]
    try:
        yield added
    finally:
        for hook in hooks:
            hook.remove()
