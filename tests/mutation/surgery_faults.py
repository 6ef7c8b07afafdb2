"""A gradient that is not finite on one rank of several, in the retain or in the unlearning window. Not a test itself.

Each fault is a run of its own: the first update is broken, the second is sound, the third and the fourth are broken and
must end the run. Every rank writes what it sees, so that the ranks can be compared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastunlearn.engines.zero.engine import ZeroEngine
from fastunlearn.errors import UserError
from fastunlearn.training.setup import Run
from fastunlearn.training.trainer import one_update

SOUND, UPDATES = 1, 4
TENSOR = "conv_out.bias"


@dataclass(frozen=True)
class Fault:
    """Where the last rank's gradient of one tensor becomes NaN, before DeepSpeed adds up the ranks' gradients."""

    stage: int
    offload: bool
    window: str

    @property
    def name(self) -> str:
        return f"fault-stage{self.stage}-{'offload-' if self.offload else ''}{self.window}"


FAULTS = [
    Fault(stage, offload, window)
    for stage, offload in ((0, False), (1, False), (2, False), (3, False), (1, True), (3, True))
    for window in ("retain", "unlearn")
]


def suffer(fault: Fault, run: Run, folder: Path) -> None:
    """Train with the fault and write this rank's weights after each update, its count and its error."""
    assert isinstance(run.engine, ZeroEngine)
    transforms = run.engine.transforms
    now: dict[str, Any] = {"window": "retain", "broken": False}

    def spoiled(gradient: Tensor) -> Tensor:
        hit = now["broken"] and now["window"] == fault.window and run.world.rank == run.world.world_size - 1
        return torch.full_like(gradient, float("nan")) if hit else gradient

    keep, project = transforms.store, transforms.apply

    def kept(*arguments: Any) -> None:
        keep(*arguments)
        now["window"] = "unlearn"

    def projected(*arguments: Any) -> Any:
        now["window"] = "retain"
        return project(*arguments)

    transforms.store, transforms.apply = kept, projected  # type: ignore[method-assign, assignment]
    run.engine.named[TENSOR].register_hook(spoiled)
    weights, message = {"start": run.engine.export_weights().trained}, ""
    for number, step in enumerate(run.table):
        if step.restart:
            run.rollout.restart(step)
        now["broken"] = number != SOUND
        try:
            one_update(run, step)
        except UserError as error:
            message = str(error)
        weights[f"after {number}"] = run.engine.export_weights().trained
    if fault.stage < 3:
        weights["own"] = {name: p.detach().clone() for name, p in run.engine.named.items()}
    everything = {f"{when}: {name}": tensor for when, some in weights.items() for name, tensor in some.items()}
    save_file(everything, folder / f"{fault.name}-rank-{run.world.rank}.safetensors")
    report = {"message": message, "skipped": run.engine.guard.skipped}
    (folder / f"{fault.name}-rank-{run.world.rank}.json").write_text(json.dumps(report))
