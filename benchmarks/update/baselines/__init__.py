"""What users have today, done again by us: the same U-Net work in the same order, for a comparison in one run.

What this is: one file per baseline, written from what the methods' code does, which ``base.py`` counts. Each says what
it evaluates per update and where that is known from, and runs on any of the benchmark's models.
What this is not: anyone's code, or a trainer: nothing here saves a model, and quality is not compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from baselines.base import Baseline
from baselines.doco_loop import DocoLoop
from baselines.esd_sdxl import EsdSdxl
from baselines.paper_kscu import PaperKscu
from baselines.quick_kscu import QuickKscu
from fastunlearn.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from whole_step.subjects import Whole

    from fastunlearn.config import Config

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
