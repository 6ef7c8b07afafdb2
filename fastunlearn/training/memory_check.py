"""Before a training begins: is it certain that memory will not suffice?

The plan is held against the GPU, or on a CPU against what is free, with room for the plan's own error. A run that may
start can still fail; ``fastunlearn plan`` shows how close it is.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastunlearn.config import Config
from fastunlearn.errors import UserError
from fastunlearn.models.description import describe_model
from fastunlearn.planning.advice import smallest_change
from fastunlearn.planning.plan import ALLOWANCE, Plan, make_plan
from fastunlearn.utils.machine import host_memory_bytes
from fastunlearn.utils.text import size

PLAN_ERROR = 0.1  # how far a plan may be off; only beyond that is the end certain


def check_memory(cfg: Config, world: int) -> None:
    """Refuse a run, or warn, as ``train.memory_check`` says. MiniCanvas fits everywhere.

    Raises:
        UserError: with the planned and the available memory, and the smallest change that fits.
    """
    if cfg.train.memory_check == "off" or cfg.uses_minicanvas:
        return
    model = describe_model(cfg)
    plan = make_plan(cfg, world, model)
    limit, needed = _gpu(plan) if torch.cuda.is_available() else _host(plan)
    if limit is None or needed * (1 - PLAN_ERROR) <= limit:
        return
    place = "a GPU" if torch.cuda.is_available() else "this machine"
    # On a CPU the rows of device and host share one memory, for which no plan is made.
    better = smallest_change(plan, model, limit + ALLOWANCE) if torch.cuda.is_available() else None
    remedy = f"it would fit with {' '.join(better.changes)}" if better else "`fastunlearn plan` shows what needs it"
    text = f"the run needs about {size(needed)}, and {place} has {size(limit)}; {remedy}"
    if cfg.train.memory_check == "refuse":
        raise UserError(f"memory: {text} (train.memory_check 'warn' starts anyway)")
    print(f"memory: {text}")


def _gpu(plan: Plan) -> tuple[int | None, int]:
    return torch.cuda.get_device_properties(0).total_memory, plan.device


def _host(plan: Plan) -> tuple[int | None, int]:
    """What is free, and what all ranks need of it: everything is on the host."""
    state = max((device + host for device, host in plan.phases.values()), default=0)
    return available_host_bytes(), plan.world * max(state, plan.loading)


def available_host_bytes(table: Path = Path("/proc/meminfo")) -> int | None:
    """What the system could give without swapping; None where it does not say."""
    return host_memory_bytes(table).get("MemAvailable")
