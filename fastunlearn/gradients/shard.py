"""One rank's part of one parameter's gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

GradientKind: TypeAlias = Literal["retain", "meta"]
"""Of what a gradient is that is stored for later: of what must be kept, or of the meta term."""


@dataclass(frozen=True)
class GradientShard:
    """A contiguous part of one parameter's averaged gradient that this rank owns, flat."""

    name: str
    tensor: Tensor
