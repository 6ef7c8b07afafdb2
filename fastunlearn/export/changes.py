"""How far exported weights are from the base model's, as both stand in the file: what rounding leaves of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Changes:
    """Counts of single weights, in the tensors that a run was to change."""

    weights: int
    """All of them."""
    changed: int
    """Those that differ from the base model's in the file's dtype."""
    lost_to_rounding: int
    """Those that the run moved and that the file's dtype rounds back to the base model's."""
    relative_change: float
    """Length of the exported change over that of the base model's weights."""
    dtype: str
    """Of the file: "fp16", "bf16" or "fp32"."""

    @property
    def lost_share(self) -> float:
        """Of the weights that the run moved; 0 where it moved none."""
        moved = self.changed + self.lost_to_rounding
        return self.lost_to_rounding / moved if moved else 0.0

    def as_json(self) -> dict[str, Any]:
        """For metrics.json."""
        return asdict(self)


def compare(changed: Mapping[str, Tensor], base: Mapping[str, Tensor], dtype: torch.dtype) -> Changes:
    """Compare fp32 results with the base's tensors of the same names, both cast to ``dtype``."""
    from fastunlearn.utils.dtypes import SHORT_NAMES

    weights = different = lost = 0
    change = length = 0.0
    for name, result in changed.items():
        before, after = base[name].detach().float().cpu(), result.detach().float().cpu()
        old, new = before.to(dtype), after.to(dtype)
        moved = after != before
        kept = new != old
        weights += result.numel()
        different += int(kept.sum())
        lost += int((moved & ~kept).sum())
        change += float((new.double() - old.double()).square().sum())
        length += float(old.double().square().sum())
    return Changes(weights, different, lost, math.sqrt(change / length) if length else 0.0, SHORT_NAMES[dtype])
