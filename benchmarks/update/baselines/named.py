"""The baselines by the names that a row gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastunlearn.errors import UserError, nearest
from update.baselines.base import Baseline
from update.baselines.doco_loop import DocoLoop
from update.baselines.esd_sdxl import EsdSdxl
from update.baselines.paper_kscu import PaperKscu
from update.baselines.quick_kscu import QuickKscu

if TYPE_CHECKING:
    import torch

    from fastunlearn.config import Config
    from update.subjects.protocol import Whole

BASELINES: dict[str, type[Baseline]] = {kind.NAME: kind for kind in (PaperKscu, QuickKscu, EsdSdxl, DocoLoop)}


def find(name: str) -> type[Baseline]:
    """The baseline of this name.

    Raises:
        UserError: there is none.
    """
    if name not in BASELINES:
        raise UserError(f"baseline: {name!r} is unknown; allowed are ours, {', '.join(BASELINES)}"
                        + nearest(name, BASELINES))  # fmt: skip
    return BASELINES[name]


def build(name: str, cfg: Config, row: dict[str, str], device: torch.device) -> Baseline:
    """Ready for its first update."""
    return find(name)(cfg, row, device)


def whole_of(name: str, kind: str, batch: int) -> Whole:
    """The run that erases one concept, as published."""
    return find(name).whole(kind, batch)


def scope_of(name: str, kind: str) -> str:
    """What it trains for this kind of concept."""
    return find(name).scope(kind)


def counterpart(name: str) -> str:
    """The method of the trainer that does the same."""
    return find(name).METHOD
