"""The files that a finished run leaves, in the order in which they come to be, from the trained weights on rank 0."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastunlearn.config import Config
from fastunlearn.engines.base import ExportedWeights
from fastunlearn.evaluation import NotRecognised, evaluate_pair, why_not_evaluated
from fastunlearn.evaluation.metrics.scores import headlines
from fastunlearn.export.card import write_card
from fastunlearn.export.changes import compare
from fastunlearn.export.formats.base import Export
from fastunlearn.export.outcome import finding
from fastunlearn.export.samples import before_after, choose_validation_rows
from fastunlearn.export.surgery_map import draw_surgery_map
from fastunlearn.export.traces import old_results
from fastunlearn.models.backbone import compute_in
from fastunlearn.models.loading import load_pipeline, stored_dtype
from fastunlearn.registry import FORMATS
from fastunlearn.utils.dtypes import DTYPES
from fastunlearn.utils.files import atomic_write_text
from fastunlearn.utils.machine import installed_versions
from fastunlearn.utils.memory import peak_memory_bytes
from fastunlearn.utils.run_folder import CARD, CONFIG, METRICS_FILE, SAMPLES, SURGERY_LOG, UNET


@dataclass(frozen=True)
class RunFigures:
    """What the loop measured."""

    updates: int
    seconds: dict[str, float]
    unet_evaluations: dict[str, int]
    world_size: int
    device: torch.device


def start_output(cfg: Config, *, resumed: bool) -> None:
    """Write config.toml; a fresh run that may overwrite an older one removes that one's results first."""
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.overwrite_output_dir and not resumed:
        for path in old_results(folder):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    atomic_write_text(folder / CONFIG, cfg.resolved().to_toml())


def write_results(cfg: Config, exported: ExportedWeights, figures: RunFigures) -> None:
    """Write everything that remains of a run."""
    cfg = cfg.resolved()  # the card and the delta name the kept concepts also where they were left to the default
    folder = Path(cfg.output_dir)
    stored = stored_dtype(cfg.model)
    base = load_pipeline(cfg.model.pretrained_model_name_or_path, options=cfg.model, unet_dtype=stored)
    weights = exported.restored(base.unet.state_dict())
    dtype = DTYPES.get(cfg.export.dtype) or stored
    changes = compare(weights, base.unet.state_dict(), dtype)
    export = Export(cfg, folder, base, weights, dtype)
    for name in cfg.export.formats:
        FORMATS[name].write(export)

    if cfg.train.resolution:
        base.unet.register_to_config(sample_size=cfg.train.resolution // base.vae_scale_factor)
    compute_in(base.unet, DTYPES[cfg.compute_dtype])
    base.to(figures.device)
    before_after(
        base,
        {name: tensor.to(dtype) for name, tensor in weights.items()},
        choose_validation_rows(cfg),
        folder / SAMPLES / "before_after.png",
        seeds=cfg.evaluation.seeds[: cfg.report.num_validation_seeds],
        steps=cfg.evaluation.num_inference_steps,
        guidance=cfg.evaluation.guidance_scale,
        batch_size=cfg.evaluation.batch_size,
        progress=True,
    )
    draw_surgery_map(folder / SURGERY_LOG, folder / SAMPLES / "surgery.png")
    metrics = collect_metrics(cfg, figures) | {"changes": changes.as_json()}
    del base
    metrics |= _measured(cfg, folder)
    atomic_write_text(folder / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")
    write_card(cfg, metrics, folder / CARD)
    print(_summary(cfg, folder, metrics))


def _measured(cfg: Config, folder: Path) -> dict[str, Any]:
    """What a classifier saw before and after, or why none was asked."""
    reason = "it was switched off" if cfg.evaluation.mode == "off" else why_not_evaluated(cfg)
    if reason is not None:
        return {"not_evaluated": reason}
    try:
        return {"evaluation": evaluate_pair(cfg, cfg.model.pretrained_model_name_or_path, folder / UNET)}
    except NotRecognised as error:
        return {"not_evaluated": str(error).removeprefix("evaluation: ")}


def collect_metrics(cfg: Config, figures: RunFigures) -> dict[str, Any]:
    """What metrics.json holds, evaluation apart."""
    return {
        "method": cfg.method,
        "concepts": [concept.name for concept in cfg.concepts],
        "updates": figures.updates,
        "seconds": {name: round(value, 3) for name, value in figures.seconds.items()},
        "unet_evaluations": figures.unet_evaluations | {"total": sum(figures.unet_evaluations.values())},
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
