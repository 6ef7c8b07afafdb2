"""A projection over shards that a test makes up: transforms, buffer and guard as an engine puts them together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastunlearn.gradients.buffer import GradientBuffer
from fastunlearn.gradients.guard import FiniteGuard
from fastunlearn.gradients.shard import GradientShard
from fastunlearn.gradients.stats import SurgeryStats
from fastunlearn.gradients.transforms import Clip, GradientTransforms, Project
from fastunlearn.schema.sections import SurgeryConfig
from fastunlearn.utils.distributed import World

ALONE = World(0, 1, torch.device("cpu"))


class Surgery:
    """Store a retain gradient, project against it, and ask whether the update may be applied."""

    def __init__(self, cfg: SurgeryConfig, names: Sequence[str]) -> None:
        buffer = GradientBuffer(cfg.retain_dtype, cfg.retain_device, cfg.retain_ema)
        stored = {"retain": buffer}
        self.transforms = GradientTransforms(
            [Project(cfg, buffer)],
            Clip(0.0),
            names,
            ALONE,
            sharded=False,
            stored=stored,  # type: ignore[arg-type]
        )
        self.guard = FiniteGuard(cfg.max_skipped_updates)

    def keep(self, shards: list[GradientShard]) -> None:
        self.transforms.store("retain", shards)

    def project(self, shards: list[GradientShard]) -> SurgeryStats:
        (stats,) = self.transforms.apply(shards)
        return stats

    def is_finite(self, stats: SurgeryStats) -> bool:
        allowed = self.guard.allows(stats.plan.found_inf)
        if not allowed:
            self.transforms.reset_broken([stats])
        return allowed

    def state_dict(self) -> dict[str, Tensor]:
        return self.transforms.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.transforms.load_state_dict(state)
