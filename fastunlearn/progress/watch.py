"""The probe of a run under way: looks when it is time to, and keeps the weights of the best look."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.engines.base import ExportedWeights
from fastunlearn.models.backbone import Backbone
from fastunlearn.progress.probe import Probe
from fastunlearn.progress.reading import Reading
from fastunlearn.progress.stopping import Progress
from fastunlearn.sampling.image_pool import Predict


class Watch:
    """A probe, what it saw, and the weights with which it saw most."""

    def __init__(self, probe: Probe, progress: Progress) -> None:
        self.probe, self.progress = probe, progress
        self.seconds = 0.0
        self._best: ExportedWeights | None = None

    def is_due(self, update: int) -> bool:
        """Whether a look belongs after so many updates."""
        return update >= self.progress.due

    def look(self, update: int, models: Predictors, export: Callable[[], ExportedWeights]) -> Reading:
        """What would be exported now is drawn and entered; the weights of the best look so far are put aside.
        Collective."""
        started = time.perf_counter()
        reading = self.probe.look(update, models.probed)
        if self.progress.add(reading) and self.progress.stops:
            self._best = export()
        self.seconds += time.perf_counter() - started
        return reading

    def weights(self, now: Callable[[], ExportedWeights], edited: Mapping[str, Tensor]) -> ExportedWeights:
        """What remains: those of the best look, or where nothing stops a run those it ended with. Collective."""
        return now() if self._best is None else replace(self._best, edited=edited)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint. The originals are drawn again."""
        state = {"progress": self.progress.state_dict(), "seconds": self.seconds}
        if self._best is not None:
            state["best"] = {"trained": self._best.trained, "rounded": self._best.rounded}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the looks of a checkpoint."""
        self.progress.load_state_dict(state["progress"])
        self.seconds = state["seconds"]
        if "best" in state:
            self._best = ExportedWeights(**state["best"])


def as_it_is(backbone: Backbone) -> Predict:
    """The predictions of a backbone's own U-Net, before any engine has it."""
    return Predictors(backbone, backbone.unet, backbone.unet, backbone.unet).probed
