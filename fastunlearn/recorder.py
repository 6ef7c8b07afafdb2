"""What a run says while it goes: progress bar, train_log.jsonl, TensorBoard curves, and the stop when a loss diverges.

What this is: the only place where training figures leave the device, once per ``logging_steps`` updates.
What this is not: the evaluation (``scoring``) or the final files (``results.py``).
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastunlearn.config import Config
from fastunlearn.errors import UserError
from fastunlearn.files import atomic_write_text
from fastunlearn.keysteps import KeyStep
from fastunlearn.memory import peak_memory_bytes
from fastunlearn.zero import World, mean_over_ranks

LOG_NAME = "train_log.jsonl"


class Recorder:
    """Collects one entry per update on the device and writes them in batches."""

    def __init__(self, cfg: Config, world: World, total: int, start: int) -> None:
        self._world = world
        self._every = cfg.train.logging_steps
        self._pending: list[tuple[dict[str, Any], Tensor, Any]] = []
        self._path = Path(cfg.output_dir) / LOG_NAME
        self._clock = time.perf_counter()
        self._writer = None
        if not world.is_main:
            return
        _truncate_log(self._path, start)
        self._bar = tqdm(total=total, initial=start, desc=cfg.method, unit="update", dynamic_ncols=True)
        if cfg.report.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(Path(cfg.output_dir) / "logs"), purge_step=start)

    def record(self, step: KeyStep, timestep: int, losses: list[Tensor], grad_norm: Any, learning_rate: float) -> None:
        """Remember one update. ``losses`` are its micro-batches' scalars; nothing is read from the device yet."""
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
        self._pending.append((entry, torch.stack([loss.detach() for loss in losses]).mean(), grad_norm))
        if self._world.is_main:
            self._bar.update()
        if len(self._pending) >= self._every:
            self.flush()

    def flush(self) -> None:
        """Write what is pending. Collective: the losses are averaged over the ranks.

        Raises:
            UserError: a loss or a gradient norm is not finite.
        """
        if not self._pending:
            return
        losses = mean_over_ranks(torch.stack([loss for _, loss, _ in self._pending])).tolist()
        pending, self._pending = self._pending, []
        entries = []
        for (entry, _, norm), loss in zip(pending, losses, strict=True):
            unlearn_norm = None if norm is None else float(norm)
            # Filled by gradient surgery; a run without it has no retain gradient.
            surgery = {"retain_grad_norm": None, "cosine": None, "projected_share": None}
            entries.append(entry | {"loss": loss, "unlearn_grad_norm": unlearn_norm} | surgery)
        if self._world.is_main:
            self._write(entries)
        _refuse_divergence(entries)
        self._clock = time.perf_counter()

    def close(self) -> None:
        """Flush and close the files."""
        self.flush()
        if self._world.is_main:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def _write(self, entries: list[dict[str, Any]]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as log:
                log.writelines(json.dumps(entry) + "\n" for entry in entries)
        except OSError as error:
            raise UserError(
                f"output_dir: cannot write {self._path} ({error.strerror}); free some space and resume"
            ) from error
        self._bar.set_postfix(loss=f"{entries[-1]['loss']:.4g}")
        if self._writer is not None:
            for entry in entries:
                for name in ("loss", "unlearn_grad_norm", "lr", "seconds"):
                    if entry[name] is not None:
                        self._writer.add_scalar(f"train/{name}", entry[name], entry["update"])


def _refuse_divergence(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        if not math.isfinite(entry["loss"]) or not math.isfinite(entry["unlearn_grad_norm"] or 0.0):
            raise UserError(
                f"the loss is not finite at update {entry['update']}: lower train.learning_rate or set "
                "train.max_grad_norm; nothing was exported"
            )


def _truncate_log(path: Path, start: int) -> None:
    """Drop entries that a killed run wrote after its last checkpoint: they will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the line that the kill cut short
        if entry["update"] < start:
            kept.append(line + "\n")
    atomic_write_text(path, "".join(kept))
