"""What every export format provides, and what it is handed. Importable without torch, as each format's file is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fastunlearn.config import Config
    from fastunlearn.models.loading import Pipeline


@dataclass(frozen=True)
class Export:
    """A finished run's weights, ready to be written."""

    cfg: Config
    folder: Path
    """The run's output folder."""
    base: Pipeline
    """The original pipeline; it is not changed."""
    changed: Mapping[str, Tensor]
    """The U-Net's tensors that the run changed, fp32 on the host."""
    dtype: torch.dtype
    """Of the file."""


class ExportFormat(ABC):
    """One format: a file or folder in the run's output folder."""

    title: str
    """What it is, for the model card."""
    path: str
    """Its name in the output folder."""
    read_by: str = ""
    """What reads it later, so that every run has to write it; "": nothing."""

    @property
    def files(self) -> list[str]:
        """Those of its files whose names are known beforehand, in the output folder."""
        return [self.path]

    @abstractmethod
    def disk_bytes(self, unet_bytes: int, trained: int) -> int:
        """What it takes on the disk, at most. ``unet_bytes``: the base's U-Net files; ``trained``: parameters."""

    @abstractmethod
    def write(self, export: Export) -> None:
        """Write it; what was there before is replaced in one step.

        Raises:
            UserError: a weight is not finite, or the file cannot be written.
        """
