"""What a pass over the gradients saw: norms, conflicts, and whether everything was finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastunlearn.models.parameter_names import block_of
from fastunlearn_kernels import SurgeryPlan


def segment_names(names: Sequence[str], granularity: str) -> list[str]:
    """What each parameter's segment is called: its own name, its block's, or ``all``."""
    if granularity == "tensor":
        return list(names)
    return [block_of(name) for name in names] if granularity == "block" else ["all"] * len(names)


@dataclass
class SurgeryStats:
    """What one pass over an update's gradient saw, still on the device.

    ``table``: (segments, 3) uu, ur, rr before the pass.
    """

    table: Tensor
    plan: SurgeryPlan

    @property
    def cosine(self) -> Tensor:
        """Between the two gradients as wholes; 0 where one of them is."""
        uu, ur, rr = self.table[:, :3].sum(0)
        return torch.where(uu * rr > 0, ur / (uu * rr).sqrt(), torch.zeros_like(ur))

    @property
    def conflicting_share(self) -> Tensor:
        """Share of the segments in which the gradients point against each other."""
        return (self.table[:, 1] < 0).double().mean()

    def cosine_of_blocks(self, block_of_segment: Tensor, count: int) -> Tensor:
        """(blocks,) cosine between the gradients in each block; ``block_of_segment`` (segments,) int64."""
        sums = torch.zeros(count, 3, dtype=self.table.dtype, device=self.table.device)
        sums.index_add_(0, block_of_segment.to(self.table.device), self.table[:, :3])
        uu, ur, rr = sums.unbind(1)
        return torch.where(uu * rr > 0, ur / (uu * rr).sqrt(), torch.zeros_like(ur))

    @property
    def retain_grad_norm(self) -> Tensor:
        """Norm of the retain gradient."""
        return self.table[:, 2].sum().sqrt()


class BlockCosines:
    """Turns a table per segment into cosines per block of the U-Net."""

    def __init__(self, segments: Sequence[str], granularity: str) -> None:
        names = [block_of(segment) if granularity == "tensor" else segment for segment in segments]
        self.blocks = list(dict.fromkeys(names))
        index = {block: i for i, block in enumerate(self.blocks)}
        self._block = torch.tensor([index[name] for name in names])

    def of(self, stats: SurgeryStats) -> dict[str, float]:
        """Cosine in each block, by name."""
        values = stats.cosine_of_blocks(self._block, len(self.blocks)).tolist()
        return dict(zip(self.blocks, (round(value, 5) for value in values), strict=True))
