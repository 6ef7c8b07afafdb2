"""The files that a finished run leaves, in the order in which they come to be, from the trained weights on rank 0."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.engines.base import ExportedWeights
from fastunlearn.errors import UserError
from fastunlearn.evaluation import NotRecognised, evaluate_pair, why_not_evaluated
from fastunlearn.evaluation.metrics.scores import headlines
from fastunlearn.export.card import write_card
from fastunlearn.export.changes import compare
from fastunlearn.export.formats.base import Export
from fastunlearn.export.formats.delta import FORMAT as DELTA
from fastunlearn.export.formats.delta import delta_metadata, write_delta
from fastunlearn.export.outcome import erased_by_probes, finding, progress_outcome
from fastunlearn.export.progress_curve import draw_progress
from fastunlearn.export.samples import before_after, choose_validation_rows
from fastunlearn.export.surgery_map import draw_surgery_map
from fastunlearn.export.traces import file_names
from fastunlearn.models.backbone import compute_in
from fastunlearn.models.loading import Pipeline, load_pipeline, stored_dtype
from fastunlearn.progress.stopping import Progress
from fastunlearn.registry import FORMATS
from fastunlearn.utils.dtypes import DTYPES
from fastunlearn.utils.files import atomic_write_text, remove, write_errors
from fastunlearn.utils.folders.marker import files_below, record_files
from fastunlearn.utils.folders.replacing import clear_unfinished, mark_complete, put_in_place
from fastunlearn.utils.machine import installed_versions
from fastunlearn.utils.memory import peak_memory_bytes
from fastunlearn.utils.run_folder import (
    CARD,
    CONFIG,
    METRICS_FILE,
    SAMPLES,
    SURGERY_LOG,
    UNET,
    final_folder,
    list_checkpoints,
)
from fastunlearn.utils.text import first_line, json_text

SCORES = "evaluation scores"


@dataclass(frozen=True)
class RunFigures:
    """What the loop measured."""

    updates: int
    seconds: dict[str, float]
    unet_evaluations: dict[str, int]
    world_size: int
    device: torch.device
    progress: Progress | None = None
    """What the probes saw."""
    learning_rate: float | None = None
    """The peak one; None: nothing was trained."""


@dataclass
class Results:
    """What a run has left, in the folder where it worked, and what it could not."""

    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    weights: Path | None = None
    """The trained weights, wherever the disk took them."""

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Let the block fail by itself: a line says why, and the others are tried."""
        try:
            yield
        except Exception as error:
            self.missing.append(what)
            print(f"warning: {what} is missing: {first_line(error)[:300]}", file=sys.stderr)


def start_output(cfg: Config, *, resumed: bool) -> None:
    """Write config.toml and the marker of a run. What an earlier run has left stays until this one has succeeded.

    Raises:
        UserError: the folder cannot be written.
    """
    work = Path(cfg.output_dir)
    final = final_folder(work)
    if work != final and not resumed:
        clear_unfinished(final)
    with write_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    record_files(final, [])
    record_files(work, file_names(cfg))
    atomic_write_text(work / CONFIG, _of(final, cfg.resolved()).to_toml())


def keep_weights(cfg: Config, exported: ExportedWeights) -> Path | None:
    """Bring the trained weights to the disk, before anything else is tried; to the system's folder for temporary files
    where the output folder does not take them.

    Without the base model: weights whose rounding it would undo are as they were trained, and in fp32.
    """
    dtype = torch.float32
    with suppress(Exception):  # the base model's files are asked for theirs
        dtype = torch.float32 if exported.rounded else DTYPES.get(cfg.export.dtype) or stored_dtype(cfg.model)
    weights = {**exported.edited, **exported.trained}
    cast = {name: tensor.to(dtype) for name, tensor in weights.items()}
    if not all(torch.isfinite(tensor).all() for tensor in cast.values()):
        cast = weights
    try:
        return _write_delta(cfg, cast, Path(cfg.output_dir))
    except (UserError, OSError) as error:
        print(f"warning: {first_line(error)}", file=sys.stderr)
    try:
        place = _write_delta(cfg, cast, Path(tempfile.mkdtemp(prefix="fastunlearn-")))
    except (UserError, OSError) as error:
        print(f"warning: nor elsewhere: {first_line(error)}", file=sys.stderr)
        return None
    print(f"the trained weights are in {place}", file=sys.stderr)
    return place


def _write_delta(cfg: Config, weights: Mapping[str, Tensor], folder: Path) -> Path:
    place = folder / DELTA.path
    write_delta(weights, place, delta_metadata(cfg.resolved()))
    return place


def write_results(cfg: Config, exported: ExportedWeights, figures: RunFigures, weights: Path | None) -> Results:
    """Try everything that remains of a run. ``weights``: where the trained weights are already.

    The base model is read once more: after hours, its disk or the hub may not be there. So each result may fail alone.
    """
    cfg = cfg.resolved()  # the card and the delta name the kept concepts also where they were left to the default
    folder = Path(cfg.output_dir)
    results = Results(folder, collect_metrics(cfg, figures), weights=weights)
    base = _export(cfg, exported, results)
    pictures = f"{SAMPLES}/before_after.png"
    if base is None:
        results.missing.append(pictures)
    else:
        with results.attempt(pictures):
            _draw(cfg, base, figures.device, folder / pictures)
    del base
    with results.attempt(f"{SAMPLES}/progress.png"):
        draw_progress(results.metrics["progress"], folder / SAMPLES / "progress.png")
    with results.attempt(f"{SAMPLES}/surgery.png"):
        draw_surgery_map(folder / SURGERY_LOG, folder / SAMPLES / "surgery.png")
    _measure(cfg, results)
    with results.attempt(METRICS_FILE):
        atomic_write_text(folder / METRICS_FILE, json_text(results.metrics) + "\n")
    with results.attempt(CARD):
        write_card(_of(final_folder(folder), cfg), results.metrics, folder / CARD)
    return results


def _export(cfg: Config, exported: ExportedWeights, results: Results) -> _Edited | None:
    """The weights in every format. Gives what the pictures are drawn with; None where the base cannot be read."""
    base = None
    with results.attempt(UNET):
        stored = stored_dtype(cfg.model)
        base = load_pipeline(cfg.model.pretrained_model_name_or_path, options=cfg.model, unet_dtype=stored)
        changed = exported.restored(base.unet.state_dict())
        dtype = DTYPES.get(cfg.export.dtype) or stored
        results.metrics["changes"] = compare(changed, base.unet.state_dict(), dtype).as_json()
    if base is None:
        results.missing += [
            FORMATS[name].path for name in cfg.export.formats if FORMATS[name].path not in (UNET, DELTA.path)
        ]
        return None
    export = Export(cfg, results.folder, base, changed, dtype)
    for name in cfg.export.formats:
        with results.attempt(FORMATS[name].path):
            FORMATS[name].write(export)
            record_files(results.folder, files_below(results.folder, FORMATS[name].path))
    if DELTA.path in [FORMATS[name].path for name in cfg.export.formats]:
        results.weights = results.folder / DELTA.path if DELTA.path not in results.missing else results.weights
    elif UNET not in results.missing:
        remove(results.folder / DELTA.path)  # it was there for the case that nothing else would be
    return _Edited(base, {name: tensor.to(dtype) for name, tensor in changed.items()})


class _Edited(NamedTuple):
    base: Pipeline
    changed: dict[str, Tensor]


def _draw(cfg: Config, edited: _Edited, device: torch.device, picture: Path) -> None:
    base = edited.base
    if cfg.train.resolution:
        base.unet.register_to_config(sample_size=cfg.train.resolution // base.vae_scale_factor)
    compute_in(base.unet, DTYPES[cfg.compute_dtype])
    base.to(device)
    before_after(
        base,
        edited.changed,
        choose_validation_rows(cfg),
        picture,
        seeds=cfg.evaluation.seeds[: cfg.report.num_validation_seeds],
        steps=cfg.evaluation.num_inference_steps,
        guidance=cfg.evaluation.guidance_scale,
        batch_size=cfg.evaluation.batch_size,
        progress=True,
    )


def _measure(cfg: Config, results: Results) -> None:
    """Enter what a classifier saw before and after, or why none was asked."""
    reason = "it was switched off" if cfg.evaluation.mode == "off" else why_not_evaluated(cfg)
    if reason is None and UNET in results.missing:
        reason = "the edited U-Net could not be written"
        results.missing.append(SCORES)
    results.metrics["not_evaluated"] = reason or "it failed"
    if reason is not None:
        return
    with results.attempt(SCORES):
        try:
            base = cfg.model.pretrained_model_name_or_path
            results.metrics["evaluation"] = evaluate_pair(cfg, base, results.folder / UNET)
            results.metrics["not_evaluated"] = None
        except NotRecognised as error:
            results.metrics["not_evaluated"] = str(error).removeprefix("evaluation: ")


def settle(cfg: Config, results: Results) -> int:
    """Put the results where they belong if all are there, and say what came of the run; returns the exit status.

    Raises:
        UserError: they cannot be put there.
    """
    work, folder = results.folder, final_folder(results.folder)
    if not results.missing:
        if work != folder:
            mark_complete(folder)
            put_in_place(folder)
        print(_summary(cfg, folder, results.metrics))
        return 0 if erased_by_probes(results.metrics) in (None, True) else 3
    lines = [f"error: not all results are there; missing: {', '.join(results.missing)}"]
    if results.weights is not None:
        lines.append(f"the trained weights are in {results.weights}")
    if work != folder:
        lines.append(f"what there is lies in {work}, and the earlier results stay")
    if list_checkpoints(work):
        lines.append(
            "make them again with the same command and --resume_from_checkpoint latest (without --overwrite_output_dir)"
        )
    elif set(results.missing) <= {SCORES}:
        lines.append(f"make them again with fastunlearn evaluate --model {work}")
    else:
        lines.append("make them again with the same command and --overwrite_output_dir")
    print("; ".join(lines), file=sys.stderr)
    return 3


def _of(folder: Path, cfg: Config) -> Config:
    return cfg.model_copy(update={"output_dir": str(folder)})


def collect_metrics(cfg: Config, figures: RunFigures) -> dict[str, Any]:
    """What metrics.json holds, evaluation apart."""
    return {
        "method": cfg.method,
        "concepts": [concept.name for concept in cfg.concepts],
        "learning_rate": figures.learning_rate,
        "updates": figures.updates,
        "seconds": {name: round(value, 3) for name, value in figures.seconds.items()},
        "unet_evaluations": figures.unet_evaluations | {"total": sum(figures.unet_evaluations.values())},
        "progress": None if figures.progress is None else progress_outcome(cfg, figures.progress, figures.updates),
        "peak_memory_bytes": peak_memory_bytes(figures.device),
        "world_size": figures.world_size,
        "engine": cfg.engine if cfg.trains else None,
        "zero_stage": cfg.zero_stage,
        "evaluation": None,
        "not_evaluated": None,
        "versions": installed_versions(),
        "device": torch.cuda.get_device_name(figures.device) if figures.device.type == "cuda" else "cpu",
    }


def _summary(cfg: Config, folder: Path, metrics: Mapping[str, Any]) -> str:
    evaluations = metrics["unet_evaluations"]["total"]
    lines = [f"{metrics['updates']} updates, {evaluations} U-Net evaluations, {metrics['seconds']['total']:.0f} s"]
    lines.append(finding(cfg, metrics))
    after = (metrics["evaluation"] or {}).get("after")
    if after:
        lines.append("  ".join(f"{name} {after[name]:.3f}" for name in headlines() if after.get(name) is not None))
    lines.append(f"picture: {folder / 'samples' / 'before_after.png'}   U-Net: {folder / UNET}")
    return "\n".join(lines)
