"""A low-rank addition (LoRA, arXiv:2106.09685) to the attention projections, the U-Net's own weights as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastunlearn.evaluation.attacks.base import Attack, Edit, Target

if TYPE_CHECKING:
    from fastunlearn.evaluation.attacks.settings import Settings


class LowRank(Attack):
    """Of rank ``--lora_rank``."""

    title = "low-rank additions to its attention projections"
    rate_factor = 10.0

    def facts(self, settings: Settings) -> dict[str, Any]:
        """The rank."""
        return {"lora_rank": settings.lora_rank}

    @contextmanager
    def edit(self, target: Target) -> Iterator[Edit]:
        """The additions are removed afterwards."""
        from fastunlearn.denoisers.lora import low_rank
        from fastunlearn.models.parameter_names import set_trainable

        unet = target.backbone.unet
        set_trainable(unet, [])
        with low_rank(unet, target.settings.lora_rank, target.seed) as added:
            yield Edit([parameter for pair in added for parameter in pair.parameters()], target.embed)


LORA = LowRank()
