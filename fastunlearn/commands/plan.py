"""``fastunlearn plan``: what a run will need of memory, as a table or JSON; the figures are made in ``planning/``.

The exit status is 0 where the run fits or no limit is known, and 1 where it does not fit.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from dataclasses import asdict
from typing import TYPE_CHECKING

from fastunlearn.commands.train import NUM_GPUS, rank_count
from fastunlearn.config import Config, config_of, resolved_scope, run_options
from fastunlearn.config.options import Option
from fastunlearn.errors import UserError
from fastunlearn.utils.environment import prepare_environment
from fastunlearn.utils.memory_rows import ALWAYS, Row
from fastunlearn.utils.text import GIB, size

if TYPE_CHECKING:
    from fastunlearn.planning.plan import Plan

DESCRIPTION = """\
Say what a run will need of memory, before any weights are loaded:

  fastunlearn plan --preset sdxl-24gb-style --vram 24

All options of `fastunlearn train` are understood."""
VRAM = Option("vram", "memory of one GPU (default: that of the GPU that is there)", "GIB")
JSON = Option("json", "print JSON only", switch=True)

PHASE_WORDS = {
    "attack": "simulated attack",
    "backward": "forward and backward pass",
    "reduce": "mean over ranks",
    "keep": "retain gradient put aside",
    "project": "projection",
    "update": "optimizer step",
}


def main(parser: ArgumentParser, argv: list[str]) -> int:
    """The options of ``fastunlearn train``, and ``--vram`` and ``--json``."""
    parser.description = DESCRIPTION
    given = run_options(parser, NUM_GPUS, VRAM, JSON).help_or_read(argv)
    ranks, vram = rank_count(given.pop(NUM_GPUS.name, None)), gib(given.pop(VRAM.name, None))
    as_json = given.pop(JSON.name, False)
    config = config_of(given)
    prepare_environment(1)
    return run(config, ranks, vram, as_json)


def gib(text: str | None) -> float | None:
    """The value of ``--vram``.

    Raises:
        UserError: it is no size of a GPU's memory.
    """
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise UserError(f"--vram: {text!r} is not allowed; give the memory of one GPU in GiB, such as 24")
    return number


def run(cfg: Config, ranks: int, vram: float | None, as_json: bool) -> int:
    """Print the plan of a configuration; return the exit status. ``vram``: GiB, by default those of the GPU.

    Raises:
        UserError: the model folder cannot be read.
    """
    from fastunlearn.models.description import describe_model
    from fastunlearn.planning.advice import smallest_change
    from fastunlearn.planning.plan import make_plan

    limit = _gpu_bytes() if vram is None else int(vram * GIB)
    model = describe_model(cfg)
    plan = make_plan(cfg, ranks, model)
    fits = limit is None or plan.fits(limit)
    better = None if fits or limit is None else smallest_change(plan, model, limit)
    print(json.dumps(as_data(plan, limit, better), indent=2) if as_json else as_text(plan, limit, better))
    return 0 if fits else 1


def _gpu_bytes() -> int | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def as_text(plan: Plan, limit: int | None, better: Plan | None) -> str:
    """The table, the phases, the verdict and the evaluations."""
    cfg = plan.cfg
    lines = [
        f"{cfg.method} on {cfg.model.pretrained_model_name_or_path}: {plan.sizes.total:,} parameters, "
        f"{sum(plan.sizes.trained):,} {'trained' if cfg.trains else 'edited'} ({resolved_scope(cfg)})",
        _how(plan) if cfg.trains else "edited in closed form, without updates, on one rank",
        "",
    ]
    width = max(len(row.name) for row in plan.rows)
    lines.append(f"{'each rank':<{width}}  {'device':>10}  {'host':>10}")
    for row in plan.rows:
        lines.append(f"{row.name:<{width}}  {size(row.device):>10}  {size(row.host):>10}{_when(row)}")
    lines.append("")
    for phase, (device, host) in plan.phases.items() if cfg.trains else ():
        if phase not in ("keep", "project") or cfg.retains:
            lines.append(f"{'during: ' + PHASE_WORDS[phase]:<{width}}  {size(device):>10}  {size(host):>10}")
    lines.append(f"{'at most':<{width}}  {size(plan.device):>10}  {size(plan.host):>10}")
    if 0 < plan.loading == plan.host:
        lines[-1] += "  (host: while the pipeline is loaded)"
    if plan.world > 1 and plan.host:
        lines.append(f"{'at most, all ranks':<{width}}  {'':>10}  {size(plan.host * plan.world):>10}")
    lines += ["", *_verdict(plan, limit, better), *_evaluations(plan)]
    return "\n".join(lines)


def _how(plan: Plan) -> str:
    cfg = plan.cfg
    return (
        f"{cfg.engine_spec.title(cfg)}, "
        f"{plan.world} rank{'s' if plan.world > 1 else ''}, "
        f"{'bf16' if cfg.model.mixed_precision == 'bf16' else 'fp32'}, batch {cfg.train.train_batch_size}"
        + (f", retain batch {cfg.retain_batch_size}" if cfg.retains else "")
    )


def _when(row: Row) -> str:
    if row.phases == ALWAYS:
        return ""
    return "  " + ", ".join(row.phases) + (f" ({', '.join(row.windows)})" if len(row.windows) > 1 else "")


def _verdict(plan: Plan, limit: int | None, better: Plan | None) -> list[str]:
    from fastunlearn.planning.plan import ALLOWANCE

    if limit is None:
        return ["no limit known: give --vram"]
    asked = f"{size(plan.device)} and {size(ALLOWANCE)} for the CUDA context and workspaces, of {size(limit)}"
    if plan.fits(limit):
        return [f"fits: {asked}"]
    if better is None:
        return [f"does not fit: {asked}", "no change that is known here would make it fit"]
    return [f"does not fit: {asked}", f"fits with {' '.join(better.changes)} ({size(better.device)})"]


def _evaluations(plan: Plan) -> list[str]:
    count = plan.evaluations
    return [
        f"U-Net evaluations, all ranks: {count.total:,}: trajectories {count.rollout:,}, teacher {count.teacher:,}, "
        f"student forward {count.student_forward:,}, backward {count.student_backward:,}, probes {count.probe:,}",
        *(
            ["(at most: the run ends earlier where its probes say that the concepts are gone)"]
            if plan.cfg.stops_when_erased
            else []
        ),
        "(single samples; the pictures and scores before and after a run are not among them)",
    ]


def as_data(plan: Plan, limit: int | None, better: Plan | None) -> dict:
    """The same for ``--json``, in bytes."""
    from fastunlearn.planning.plan import ALLOWANCE

    return {
        "parameters": plan.sizes.total,
        "trained_parameters": sum(plan.sizes.trained),
        "ranks": plan.world,
        "rows": [asdict(row) for row in plan.rows],
        "phases": {name: {"device": device, "host": host} for name, (device, host) in plan.phases.items()},
        "device_bytes": plan.device,
        "host_bytes": plan.host,
        "loading_host_bytes": plan.loading,
        "limit_bytes": limit,
        "allowance_bytes": ALLOWANCE,
        "fits": None if limit is None else plan.fits(limit),
        "fits_with": None if better is None else list(better.changes),
        "unet_evaluations": asdict(plan.evaluations) | {"total": plan.evaluations.total},
    }
