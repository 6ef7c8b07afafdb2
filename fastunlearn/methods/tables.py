"""The updates of a run, rank by rank, from the method that the configuration names."""

from __future__ import annotations

from dataclasses import replace

from fastunlearn.config import Config, resolved_steps
from fastunlearn.methods.base import Method
from fastunlearn.registry import METHODS
from fastunlearn.sampling.key_steps import KeyStep


def build_method(cfg: Config) -> Method:
    """The method that the configuration names."""
    return METHODS[cfg.method](cfg)


def rank_table(cfg: Config, rank: int, world_size: int) -> list[KeyStep]:
    """The updates of one rank: the same on all, or with ``train.spread_concepts`` those of the rank's own concepts.

    Rank r of n has the concepts r, r + n, r + 2 n, ...; where there are fewer concepts than ranks, several ranks have
    the same one, with trajectories of their own. All tables are equally long.
    """
    if not cfg.train.spread_concepts:
        return build_method(cfg).table()
    count = len(cfg.concepts)
    mine = list(range(rank, count, world_size)) or [rank % count]
    train = cfg.train.model_copy(update={"max_train_steps": resolved_steps(cfg)})
    own = cfg.model_copy(update={"concepts": [cfg.concepts[i] for i in mine], "train": train})
    return [replace(step, concept=mine[step.concept]) for step in build_method(own).table()]
