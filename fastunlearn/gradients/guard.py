"""The one place where an update is refused because something is not finite. It stands before every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastunlearn.errors import UserError
from fastunlearn.gradients.stats import SurgeryStats


class FiniteGuard:
    """Counts the updates that were skipped, and stops a run that does nothing else."""

    def __init__(self, limit: int) -> None:
        """``limit``: skipped updates in a row at which the run stops."""
        self.limit = limit
        self.in_a_row = 0
        self.skipped = 0

    def allows(self, passes: Sequence[SurgeryStats]) -> bool:
        """Whether the update may be applied: the same answer on every rank, since the tables are. Waits for the device,
        once.

        Raises:
            UserError: too many updates in a row were not finite.
        """
        if not bool(torch.stack([stats.plan.found_inf.reshape(()) for stats in passes]).any()):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.skipped += 1
        if self.in_a_row >= self.limit:
            raise UserError(
                f"the unlearning or the retain gradient was not finite in {self.in_a_row} updates in a row "
                "(surgery.max_skipped_updates): lower train.learning_rate, or use model.mixed_precision 'no'; nothing "
                "was exported"
            )
        return False
