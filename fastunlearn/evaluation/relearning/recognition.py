"""What the classifier recognises while a model is attacked: a reduced grid, and the figures that are taken from it.

The evaluation's own prompts and seeds, fewer of them, so that a curve of several points takes minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fastunlearn.evaluation.classifiers.base import Label, choose_classifier
from fastunlearn.evaluation.metrics.scores import headlines, score
from fastunlearn.evaluation.pictures.grid import EvaluationGrid

if TYPE_CHECKING:
    from fastunlearn.config import Config

TARGET_SEEDS = 4
METRIC_NAMES = tuple(headlines())
FORGOTTEN = next(iter(headlines(of_erased=True)))
CURVES = ("recognised", *METRIC_NAMES)


def attack_grid(cfg: Config, sampler_steps: int | None = None) -> EvaluationGrid:
    """The target part with at most four seeds, a third of the kept pairs with one, none of the other wordings.

    ``sampler_steps``: fewer than the run's evaluation takes, for the sake of time.
    """
    few: dict = {"num_inference_steps": sampler_steps} if sampler_steps else {}
    few |= {"target_seeds": min(TARGET_SEEDS, cfg.evaluation.target_seeds), "retain_seeds": 1}
    cfg = cfg.model_copy(update={"evaluation": cfg.evaluation.model_copy(update=few)})
    classifier = choose_classifier(cfg)
    target, kept = classifier.grid(cfg), classifier.grid(cfg, quick=True)
    samples = [sample for sample in target.samples if sample.part == "target"]
    samples += [sample for sample in kept.samples if sample.part == "kept"]
    return replace(target, samples=tuple(samples), quick=True)


def figures(grid: EvaluationGrid, seen: Sequence[Label]) -> dict[str, float]:
    """The figures of one model; ``recognised`` is the share of its pictures that do show the concept."""
    scored = score(list(zip(grid.samples, seen, strict=True)), grid.concepts, METRIC_NAMES)
    return {"recognised": 1 - scored[FORGOTTEN]} | {name: scored[name] for name in METRIC_NAMES}
