"""Which sampler a run has."""

from __future__ import annotations

from fastunlearn.config import Config
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.prompts.variants import PromptTable
from fastunlearn.sampling.anchor_sampler import AnchorSampler
from fastunlearn.sampling.base import BatchSampler, EmptySampler
from fastunlearn.sampling.batch import BatchLayout
from fastunlearn.sampling.cached_sampler import CachedSampler, Targets
from fastunlearn.sampling.image_pool import LatentPool
from fastunlearn.sampling.rollout import build_rollout


def build_sampler(
    cfg: Config,
    models: Predictors,
    prompt_table: PromptTable,
    layout: BatchLayout,
    pool: LatentPool | None = None,
    targets: Targets | None = None,
) -> BatchSampler:
    """Trajectories of the student, those that the original walked before the training (``targets``), or noised images
    of the anchors (``pool``); nothing after an edit in closed form."""
    if cfg.closed_form:
        return EmptySampler(models, cfg.sampler.num_inference_steps)
    if pool is not None:
        return AnchorSampler(cfg, models, prompt_table, layout, pool)
    if targets is not None:
        return CachedSampler(cfg, models, prompt_table, layout, targets)
    return build_rollout(cfg, models, prompt_table, layout, cfg.seed)
