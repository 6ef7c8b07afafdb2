"""How DeepSpeed's part of a checkpoint is written and read: nothing is executed, and on a full disk no rank waits.

DeepSpeed loads with ``weights_only=False``, which runs whatever a file says. Here only tensors, plain values and the
few harmless classes that its own files contain come back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from fastunlearn.errors import UserError
from fastunlearn.utils.files import save_tensors

SAFE_CLASSES = (ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler)
"""What DeepSpeed's own files hold beside tensors and plain values; each only stores what it is given."""


class CheckpointFiles(CheckpointEngine):
    """Reads and writes files for DeepSpeed.

    DeepSpeed meets its other ranks in the middle of a save: an error that left it on one rank would let the others wait
    for ever. So a failure is remembered, and raised when all is done.
    """

    def __init__(self) -> None:
        super().__init__()
        self._failure: UserError | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        """A new checkpoint begins."""
        self._failure = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """A folder for what ``save`` writes, which reports a failure."""
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError:
            return

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file, or remember why not."""
        try:
            save_tensors(state_dict, Path(path))
        except UserError as error:
            self._failure = self._failure or error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Tensors and plain values of one file.

        Raises:
            pickle.UnpicklingError: it holds something else.
        """
        with torch.serialization.safe_globals(list(SAFE_CLASSES)):
            return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """All files of this rank have been tried."""
        return True

    def raise_failure(self) -> None:
        """After a save.

        Raises:
            UserError: a file of this rank could not be written.
        """
        if self._failure is not None:
            raise self._failure
