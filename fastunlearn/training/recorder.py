"""What a run says while it goes: progress bar, train_log.jsonl, TensorBoard curves, and the stop when a loss diverges.

The only place where training figures leave the device, once per ``logging_steps`` updates.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastunlearn.config import Config
from fastunlearn.engines.base import Applied
from fastunlearn.errors import UserError
from fastunlearn.gradients.stats import BlockCosines, SurgeryStats
from fastunlearn.progress.reading import Reading
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.utils.distributed import World, mean_over_ranks
from fastunlearn.utils.files import atomic_write_text
from fastunlearn.utils.folders.marker import files_below, record_files
from fastunlearn.utils.foreign import Unreadable, parse_json
from fastunlearn.utils.memory import peak_memory_bytes
from fastunlearn.utils.run_folder import CURVES_FOLDER, PROGRESS_LOG, SURGERY_LOG, TRAIN_LOG
from fastunlearn.utils.text import first_line, json_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CURVES = (
    "loss", "retain_loss", "discriminator_loss", "unlearn_grad_norm", "retain_grad_norm", "cosine", "projected_share",
    "lr", "seconds",
)  # fmt: skip


@dataclass
class Update:
    """What one update measured, on the device: losses of its micro-batches, and what became of its gradient."""

    losses: list[Tensor] = field(default_factory=list)
    retain_losses: list[Tensor] = field(default_factory=list)
    applied: Applied = field(default_factory=partial(Applied, stepped=True))
    figures: dict[str, Tensor] = field(default_factory=dict)
    """The method's own."""


class Recorder:
    """Collects one entry per update on the device and writes them in batches."""

    def __init__(
        self, cfg: Config, world: World, total: int, start: int, segments: Sequence[str] | None = None
    ) -> None:
        """``segments``: what the rows of the projection's table stand for."""
        self._world = world
        self._every = cfg.train.logging_steps
        self._pending: list[tuple[dict[str, Any], Update, Any]] = []
        self._path = Path(cfg.output_dir) / TRAIN_LOG
        self._map = None if segments is None else BlockCosines(segments, cfg.surgery.granularity)
        self._map_path = Path(cfg.output_dir) / SURGERY_LOG
        self._clock = time.perf_counter()
        self._not_finite_since: int | None = None
        self._held: dict[Path, str] = {}
        """Lines that the disk did not take yet."""
        self._warned = False
        self._shown: dict[str, str] = {}
        self._probed: dict[str, str] = {}
        self._probe_path = Path(cfg.output_dir) / PROGRESS_LOG
        self._writer = None
        if not world.is_main:
            return
        _truncate_log(self._path, start)
        _truncate_log(self._map_path, start)
        _truncate_log(self._probe_path, start + 1)  # the probe after the last update is among what was saved
        self._bar = tqdm(total=total, initial=start, desc=cfg.method, unit="update", dynamic_ncols=True)
        if cfg.report.report_to == "tensorboard":
            self._writer = _open_curves(Path(cfg.output_dir), start)

    def record(self, step: KeyStep, timestep: int, update: Update, grad_norm: Any, learning_rate: float) -> None:
        """Remember one update; nothing is read from the device yet."""
        now = time.perf_counter()
        entry = {
            "update": step.update,
            "concept": step.concept,
            "index": step.index,
            "timestep": timestep,
            "lr": learning_rate,
            "seconds": round(now - self._clock, 6),
            "peak_memory_bytes": peak_memory_bytes(self._world.device),
        }
        self._clock = now
        self._pending.append((entry, update, grad_norm))
        if self._world.is_main:
            self._bar.update()
        if len(self._pending) >= self._every:
            self.flush()

    def show_probe(self, reading: Reading) -> None:
        """Tell what a probe saw: on the bar, in its log, as curves."""
        if not self._world.is_main:
            return
        erased, drift = reading.worst_share, reading.drift
        self._probed = {"erased": f"{erased:.0%}"} | ({} if math.isnan(drift) else {"drift": f"{drift:.2f}"})
        self._bar.set_postfix(self._shown | self._probed)
        self._append(self._probe_path, [reading.as_json()])
        figures = {"share": erased, "low": reading.worst_low, "drift": drift}
        self._draw([(f"probe/{name}", value, reading.update) for name, value in figures.items()])

    def flush(self) -> None:
        """Write what is pending. Collective: the losses are averaged over the ranks.

        Raises:
            UserError: a loss or a gradient norm is not finite.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        losses = self._means([update.losses for _, update, _ in pending])
        retained = self._means([update.retain_losses for _, update, _ in pending])
        entries = []
        for (entry, update, norm), loss, retain_loss in zip(pending, losses, retained, strict=True):
            unlearn_norm = None if norm is None else float(norm)
            projection = update.applied.projection
            figures = _surgery_figures(projection) | ({"retain_loss": retain_loss} if projection else {})
            if projection or not update.applied.stepped:
                figures["skipped"] = not update.applied.stepped
            figures |= {name: float(value) for name, value in update.figures.items()}
            entries.append(entry | {"loss": loss, "unlearn_grad_norm": unlearn_norm} | figures)
        if self._world.is_main:
            self._append(self._path, entries)
            self._show(entries)
            if self._map is not None:
                shown = [(entry["update"], update.applied.projection) for entry, update, _ in pending]
                rows = [{"update": n, "cosine": self._map.of(stats)} for n, stats in shown if stats is not None]
                self._append(self._map_path, rows)
        for entry in entries:
            self._note_divergence(entry)
        self._clock = time.perf_counter()

    def _means(self, losses: list[list[Tensor]]) -> list[float]:
        """Mean over micro-batches and ranks for each update; 0 where there was nothing to train."""
        nothing = torch.zeros((), device=self._world.device)
        means = [torch.stack(own).mean() if own else nothing for own in losses]
        return mean_over_ranks(torch.stack(means)).tolist()

    def close(self) -> None:
        """Flush and close the files.

        Raises:
            UserError: the run ended with losses that were not finite: its last updates were skipped, the weights are
                of no use.
        """
        self.flush()
        self.leave()
        if self._not_finite_since is not None:
            raise _diverged(self._not_finite_since)

    def leave(self) -> None:
        """Close the bar and the curves, whatever became of the run."""
        if self._world.is_main:
            self._bar.close()
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()

    def _note_divergence(self, entry: dict[str, Any]) -> None:
        """Remember since when the loss has not been finite. The engine's guard skips such updates, and stops the run
        itself after too many in a row."""
        if math.isfinite(entry["loss"]):
            self._not_finite_since = None
        elif self._not_finite_since is None:
            self._not_finite_since = entry["update"]
        if entry.get("skipped"):
            return
        if not math.isfinite(entry["loss"]) or not math.isfinite(entry["unlearn_grad_norm"] or 0.0):
            raise _diverged(entry["update"])

    def _append(self, path: Path, entries: list[dict[str, Any]]) -> None:
        """Add lines to a log; what a full disk does not take waits for the next time."""
        lines = self._held.pop(path, "") + "".join(json_text(entry, None) + "\n" for entry in entries)
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as log:
                log.write(lines)
        except OSError as error:
            self._held[path] = lines
            with suppress(OSError):
                os.truncate(path, size)  # no half a line
            if not self._warned:
                tqdm.write(f"warning: {path} cannot be written ({error.strerror}); the run goes on", file=sys.stderr)
            self._warned = True

    def _show(self, entries: list[dict[str, Any]]) -> None:
        self._shown = {"loss": f"{entries[-1]['loss']:.4g}"}
        self._bar.set_postfix(self._shown | self._probed)
        points = [(f"train/{name}", entry.get(name), entry["update"]) for entry in entries for name in CURVES]
        self._draw([point for point in points if point[1] is not None])

    def _draw(self, points: Sequence[tuple[str, Any, int]]) -> None:
        """(curve, value, update) for TensorBoard."""
        if self._writer is None:
            return
        try:
            for point in points:
                self._writer.add_scalar(*point)
        except OSError as error:
            self._writer = None
            tqdm.write(f"warning: no more TensorBoard curves ({error.strerror or error})", file=sys.stderr)


def _open_curves(folder: Path, start: int) -> SummaryWriter | None:
    """TensorBoard's writer; None and a line where it is not installed, or the folder cannot be written."""
    before = set(files_below(folder, CURVES_FOLDER))
    try:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / CURVES_FOLDER), purge_step=start)
    except (ImportError, OSError) as error:
        print(f"warning: no TensorBoard curves: {first_line(error)} (pip install tensorboard)", file=sys.stderr)
        return None
    record_files(folder, set(files_below(folder, CURVES_FOLDER)) - before)
    return writer


def _surgery_figures(figures: SurgeryStats | None) -> dict[str, Any]:
    """A run without surgery has no retain gradient."""
    if figures is None:
        return {"retain_grad_norm": None, "cosine": None, "projected_share": None}
    return {
        "retain_grad_norm": float(figures.retain_grad_norm),
        "cosine": float(figures.cosine),
        "projected_share": float(figures.conflicting_share),
    }


def _diverged(update: int) -> UserError:
    return UserError(
        f"the loss is not finite at update {update}: lower train.learning_rate or set train.max_grad_norm; nothing was "
        "exported"
    )


def _truncate_log(path: Path, start: int) -> None:
    """Drop entries that a killed run wrote after its last checkpoint, which will be written again, and damaged ones."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = parse_json(line)
        except Unreadable:
            continue  # the line that the kill cut short
        update = entry.get("update") if isinstance(entry, dict) else None
        if isinstance(update, int) and update < start:
            kept.append(line + "\n")
    atomic_write_text(path, "".join(kept))
