"""When a run saves its state: as often as asked, by default every few minutes, when it is told to stop, and at the end.

What nobody asked for goes again when all results are there. How a checkpoint is written is in ``checkpoint.py``.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from fastunlearn.errors import UserError
from fastunlearn.training.checkpoint import save_checkpoint
from fastunlearn.training.recorder import Recorder
from fastunlearn.training.resuming import STATE
from fastunlearn.training.setup import Run
from fastunlearn.utils.distributed import max_over_ranks
from fastunlearn.utils.files import remove
from fastunlearn.utils.folders.marker import read_marker, record_files
from fastunlearn.utils.processes.stop import Stopped, requested
from fastunlearn.utils.run_folder import list_checkpoints

INTERVAL_SECONDS = 300.0  # of the checkpoints that nobody asked for


class Saver:
    """Looks once per update whether the state of a run has to be saved, on all ranks alike."""

    def __init__(self, run: Run) -> None:
        checkpoint = run.cfg.checkpoint
        self._folder, self._every = Path(run.cfg.output_dir), checkpoint.checkpointing_steps
        self._limit = checkpoint.checkpoints_total_limit if self._every else 1
        self._last = time.monotonic()

    def after_update(self, run: Run, recorder: Recorder) -> None:
        """Save if it is time to. Collective.

        Raises:
            Stopped: a rank was told to stop; what has been trained is saved, where the disk takes it.
        """
        asked = bool(self._every) and run.position.update % self._every == 0 and run.position.update < len(run.steps)
        late = not self._every and time.monotonic() - self._last > INTERVAL_SECONDS
        signal, due = max_over_ranks([requested(), asked or late])
        if signal:
            recorder.flush()
            recorder.leave()
            saved = self._save(run, asked)
            raise Stopped(signal, None if saved is None else saved.name)
        if due:
            recorder.flush()
            self._save(run, asked)

    def save_last(self, run: Run) -> None:
        """Keep the last state until all results are there, of a run that was asked for any or long enough. Collective.

        Raises:
            Stopped: a rank was told to stop since the last update.
        """
        long = run.position.seconds > INTERVAL_SECONDS
        signal, worth = max_over_ranks([requested(), bool(self._every) or long])
        known = f"checkpoint-{run.position.update}" in [folder.name for folder in list_checkpoints(self._folder)]
        saved = self._save(run, asked=False) if (worth or signal) and not known else None
        if signal:
            raise Stopped(signal, None if saved is None else saved.name)

    def _save(self, run: Run, asked: bool) -> Path | None:
        self._last = time.monotonic()
        extra = [] if asked else [f"checkpoint-{run.position.update}/{STATE}"]
        if extra and run.world.is_main:
            with suppress(UserError):  # a full disk: then there will be no checkpoint either
                record_files(self._folder, extra)
        limit = self._limit + (1 if self._every and not asked else 0)
        return save_checkpoint(run.asked or run.cfg, run.world, run.engine, run.parts, run.position, limit=limit)


def drop_unasked(folder: Path) -> None:
    """Remove the checkpoints that nobody asked for, once all results are there. For the first rank."""
    marker = read_marker(folder)
    for checkpoint in list_checkpoints(folder):
        if marker is not None and f"{checkpoint.name}/{STATE}" in marker.files:
            remove(checkpoint)
