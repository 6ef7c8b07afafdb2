"""Embedded prompts, a batch of them or all of a run.

Shapes: B batch, L tokens, D embedding width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptEmbeds:
    """Text: ``hidden`` (B, L, D) for attention; ``pooled`` (B, P) where the architecture takes it, else None;
    ``rows`` (B,), which of the run's prompts they are, where they are unchanged."""

    hidden: Tensor
    pooled: Tensor | None
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def select(self, rows: Sequence[int] | Tensor) -> PromptEmbeds:
        """The conditions of these rows, in this order."""
        index = torch.as_tensor(rows, device=self.hidden.device)
        pooled, numbers = (None if tensor is None else tensor[index] for tensor in (self.pooled, self.rows))
        return PromptEmbeds(self.hidden[index], pooled, numbers)

    def numbered(self) -> PromptEmbeds:
        """The same as the prompts of a run, each in its row."""
        return PromptEmbeds(self.hidden, self.pooled, torch.arange(len(self), device=self.hidden.device))

    def to(self, device: torch.device, dtype: torch.dtype) -> PromptEmbeds:
        """A copy on this device in this dtype."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return PromptEmbeds(self.hidden.to(device, dtype), pooled, None if self.rows is None else self.rows.to(device))

    @staticmethod
    def cat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """Stack along the batch axis."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        rows = [part.rows for part in parts if part.rows is not None]
        return PromptEmbeds(
            torch.cat([part.hidden for part in parts]),
            torch.cat(pooled) if pooled else None,
            torch.cat(rows) if len(rows) == len(parts) else None,
        )
