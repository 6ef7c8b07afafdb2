"""Before and after: draw the grid with the base and with the edited U-Net, let the classifier look, return figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastunlearn.errors import UserError
from fastunlearn.evaluation.classifiers.base import Label, LoadedClassifier, choose_classifier
from fastunlearn.evaluation.label_cache import remembered
from fastunlearn.evaluation.metrics.scores import score, unrecognised
from fastunlearn.evaluation.pictures.drawing import generate
from fastunlearn.evaluation.pictures.grid import EvaluationGrid
from fastunlearn.models.loading import Pipeline, load_pipeline, resolve_model
from fastunlearn.registry import METRICS
from fastunlearn.utils.run_folder import CONFIG, UNET, check_results

if TYPE_CHECKING:
    from fastunlearn.config import Config


class NotRecognised(UserError):
    """The classifier does not see what the unedited model was asked to draw."""


def why_not_evaluated(cfg: Config) -> str | None:
    """None if there is a classifier that can evaluate this run, else the reason in a few words."""
    return choose_classifier(cfg).why_not(cfg)


def evaluate_pair(
    cfg: Config,
    base_path: str | os.PathLike[str],
    unet_dir: str | os.PathLike[str] | None,
    *,
    progress: bool = True,
    quick: bool = False,
) -> dict:
    """Evaluate the base model and, where ``unet_dir`` is given, the base with that U-Net: same prompts, same seeds.

    Returns:
        {"before": figures, "after": figures or None}, each as `scores.score` gives them, with "protocol" added.

    Raises:
        UserError: no classifier knows the concepts or the model, or a model cannot be loaded.
        NotRecognised: it knows them by name, but does not see them in the unedited model's pictures.
    """
    chosen = choose_classifier(cfg)
    reason = chosen.why_not(cfg)
    if reason:
        raise UserError(f"evaluation: {reason}; look at samples/before_after.png instead")
    grid, device = chosen.grid(cfg, quick=quick), device_name()
    classifier = chosen.load(device)

    def draw_base() -> Tensor:
        base = load_pipeline(base_path).to(device)
        return draw_samples(base, grid, cfg, "before" if progress else False)

    if needs_images(cfg):  # the cache holds labels only
        before = _figures(cfg, grid, classifier, draw_base())
    else:
        base = resolve_model(str(base_path))
        seen = remembered(base, None, classifier, grid, device, lambda: classifier.look(draw_base()))
        before = _figures_of_labels(cfg, grid, seen, None)
    unseen = unrecognised(before)
    if unseen is not None:
        raise NotRecognised(f"evaluation: {chosen.title} {unseen}; look at samples/before_after.png instead")
    after = None
    if unet_dir is not None:
        edited = load_pipeline(base_path, unet_path=unet_dir).to(device)
        after = _figures(cfg, grid, classifier, draw_samples(edited, grid, cfg, "after" if progress else False))
    return {"before": before, "after": after}


def evaluate_model(
    output_dir: str | os.PathLike[str], *, progress: bool = True, quick: bool = False
) -> tuple[Config, dict]:
    """Evaluate what a run left: its ``config.toml`` and ``unet/``. Returns the config and `evaluate_pair`'s result.

    Raises:
        UserError: the folder is not one that a run finished.
    """
    from fastunlearn.config import load_config

    folder = Path(output_dir)
    check_results(folder)
    cfg = load_config(str(folder / CONFIG), [])
    base = cfg.model.pretrained_model_name_or_path
    return cfg, evaluate_pair(cfg, base, folder / UNET, progress=progress, quick=quick)


def needs_images(cfg: Config) -> bool:
    """Whether one of the run's metrics looks at the pictures themselves, not at the labels alone."""
    return any(METRICS[name].needs_images for name in cfg.evaluation.metrics)


def draw_samples(pipe: Pipeline, grid: EvaluationGrid, cfg: Config, progress: bool | str) -> Tensor:
    """Draw every sample, in their order: (N, 3, H, W) fp32 in [0, 1], on the CPU."""
    return generate(
        pipe,
        [sample.prompt for sample in grid.samples],
        [sample.seed for sample in grid.samples],
        steps=grid.num_inference_steps,
        guidance=grid.guidance_scale,
        batch_size=cfg.evaluation.batch_size,
        progress=progress,
    )


def device_name() -> str:
    """Where an evaluation draws."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _figures(cfg: Config, grid: EvaluationGrid, classifier: LoadedClassifier, images: Tensor) -> dict:
    return _figures_of_labels(cfg, grid, classifier.look(images), images)


def _figures_of_labels(cfg: Config, grid: EvaluationGrid, seen: Sequence[Label], images: Tensor | None) -> dict:
    labelled = list(zip(grid.samples, seen, strict=True))
    return score(labelled, grid.concepts, cfg.evaluation.metrics, images) | {"protocol": grid.describe()}
