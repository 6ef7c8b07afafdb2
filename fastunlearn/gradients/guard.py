"""The one place where an update is refused because something is not finite. It stands before every step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastunlearn.errors import UserError


class FiniteGuard:
    """Counts the updates that were skipped, and stops a run that does nothing else."""

    def __init__(
        self, limit: int, what: str = "the unlearning or the retain gradient", rate: str = "train.learning_rate"
    ) -> None:
        """``limit``: skipped updates in a row at which the run stops; ``what`` is watched, and the field of its
        ``rate``, for messages."""
        self.limit, self.what, self.rate = limit, what, rate
        self.in_a_row = 0
        self.skipped = 0
        self.applied = 0

    def allows(self, *found_inf: Tensor) -> bool:
        """Whether the update may be applied. Waits for the device, once.

        ``found_inf``: one number each, not 0 where something is not finite; the same on every rank.

        Raises:
            UserError: too many updates in a row were not finite.
        """
        if not bool(torch.stack([flag.reshape(()) for flag in found_inf]).any()):
            self.in_a_row = 0
            self.applied += 1
            return True
        self.in_a_row += 1
        self.skipped += 1
        if self.in_a_row >= self.limit:
            raise UserError(
                f"{self.what} was not finite in {self.in_a_row} updates in a row "
                f"(surgery.max_skipped_updates): lower {self.rate}, or use model.mixed_precision 'no'; nothing "
                "was exported"
            )
        return False

    def state_dict(self) -> dict[str, int]:
        """The counts, so that a run that goes on stops where it would have stopped."""
        return {"in_a_row": self.in_a_row, "skipped": self.skipped, "applied": self.applied}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue them."""
        self.in_a_row, self.skipped, self.applied = (int(state[name]) for name in ("in_a_row", "skipped", "applied"))

    def check_end(self) -> None:
        """Refuse the result of a run that was too short for the limit and has changed nothing.

        Raises:
            UserError: every update was skipped.
        """
        if self.skipped and not self.applied:
            raise UserError(
                f"{self.what} was not finite in any of the {self.skipped} updates: lower "
                f"{self.rate}, or use model.mixed_precision 'no'; nothing was exported"
            )
