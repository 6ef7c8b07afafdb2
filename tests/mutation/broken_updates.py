"""A loss or a gradient that is not finite in a run without surgery and without a meta term. Not a test itself.

Updates 0 and 2 are sound, 1, 3 and 4 are broken on the last rank, and the two in a row must end the run. What each
update changed is written down by every rank, so that ranks can be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.engines.fused.engine import FusedEngine
from fastunlearn.engines.zero.engine import ZeroEngine
from fastunlearn.errors import UserError
from fastunlearn.training.setup import Run
from fastunlearn.training.trainer import one_update

BROKEN, UPDATES, LIMIT = (1, 3, 4), 5, 2
TENSOR = "conv_out.bias"


@dataclass(frozen=True)
class BrokenRun:
    """Which run, and what of it is not finite: a NaN in the loss, or an infinity in the gradient of one tensor."""

    engine: str
    stage: int
    method: str
    what: str

    @property
    def name(self) -> str:
        return f"{self.engine}{self.stage}-{self.method}-{self.what}"


ZERO_RUNS = [
    BrokenRun("zero", stage, method, what)
    for stage in (0, 1, 2, 3)
    for method in ("kscu", "sdd")
    for what in ("loss", "gradient")
    if not (method == "sdd" and stage == 3)  # refused: no rank has whole weights to average
]
FUSED_RUNS = [BrokenRun("fused", 1, method, what) for method in ("kscu", "sdd") for what in ("loss", "gradient")]


def broken_config(case: BrokenRun) -> Config:
    """The rate falls with every update that is applied. Half of the runs clip."""
    return Config.model_validate(
        {
            "concepts": ["neon style"],
            "method": case.method,
            "engine": case.engine,
            "train": {
                "max_train_steps": UPDATES, "train_batch_size": 1, "learning_rate": 1e-3, "lr_scheduler": "linear",
                "max_grad_norm": 1e-3 if case.what == "gradient" else 0.0,
            },
            "kscu": {"start": 0, "uncond_gradient": False},
            "prompts": {"augment_fraction": 0.0},
            "sampler": {"num_inference_steps": 10},
            "zero": {"stage": case.stage},
            "surgery": {"enabled": False, "max_skipped_updates": LIMIT},
        }
    )  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """A rank's view of one update: whether it changed anything, and what all ranks must agree on."""

    weights: bool
    tensor: bool
    """Of ``TENSOR`` alone, with its moments."""
    moments: bool
    rate: bool
    average: bool
    skipped: int
    digest: str
    """Of the weights after it."""
    message: str = ""


def suffer_broken_updates(case: BrokenRun, run: Run) -> list[dict[str, Any]]:
    """Train, and say of each update what it changed. Collective."""
    assert not run.cfg.retains and not run.cfg.has_meta and len(run.table) == UPDATES
    found = []
    for number, step in enumerate(run.table):
        if step.restart:
            run.rollout.restart(step)
        before, message = snapshot(run), ""
        with broken(case, run) if number in BROKEN else sound():
            try:
                one_update(run, step)
            except UserError as error:
                message = str(error)
        found.append(asdict(difference(before, snapshot(run), run, message)))
    return found


@contextmanager
def sound() -> Iterator[None]:
    yield


@contextmanager
def broken(case: BrokenRun, run: Run) -> Iterator[None]:
    """Inside, the last rank's loss or gradient is not finite."""
    if run.world.rank != run.world.world_size - 1:
        yield
    elif case.what == "gradient":
        handle = run.engine.named[TENSOR].register_hook(lambda gradient: gradient * float("inf"))
        yield
        handle.remove()
    else:
        loss = run.method.loss
        run.method.loss = lambda *given: spoiled(loss(*given))  # type: ignore[method-assign]
        yield
        del run.method.loss


def spoiled(output: Any) -> Any:
    return type(output)(output.loss * float("nan"), output.guided)


def snapshot(run: Run) -> dict[str, dict[str, Tensor]]:
    """Copies of everything that a skipped update must leave alone."""
    moments, own = moments_of(run)
    average = {} if run.ema is None else {**run.ema.export(), "updates": torch.tensor(run.ema.updates)}
    return {
        "weights": run.engine.export_weights().trained,
        "moments": {name: tensor.detach().clone() for name, tensor in moments.items()},
        "own": {name: tensor.detach().clone() for name, tensor in own.items()},
        "rate": {"": torch.tensor(run.engine.learning_rate, dtype=torch.float64)},
        "average": average,
    }


def moments_of(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The optimizer's state, with its count of steps; and of ``TENSOR`` alone, where each tensor has its own."""
    engine = run.engine
    if isinstance(engine, FusedEngine):
        states = {p: state for layer in engine._layers for p, state in layer.optimizer.state.items()}
        return named_tensors(states), named_tensors({"own": states.get(engine.named[TENSOR], {})})
    assert isinstance(engine, ZeroEngine)
    inner = engine.engine.optimizer
    return named_tensors((inner.optimizer if engine.stage > 0 else inner).state), {}


def named_tensors(states: Any) -> dict[str, Tensor]:
    return {
        f"{number} {key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for number, state in enumerate(states.values())
        for key, value in state.items()
        if isinstance(value, Tensor | int | float)
    }


def difference(before: dict[str, Any], after: dict[str, Any], run: Run, message: str) -> Seen:
    def moved(part: str) -> bool:
        one, two = before[part], after[part]
        return one.keys() != two.keys() or any(not torch.equal(one[name], two[name]) for name in one)

    tensor = not torch.equal(before["weights"][TENSOR], after["weights"][TENSOR]) or moved("own")
    digest = hashlib.blake2b()
    for weight in after["weights"].values():
        assert weight.isfinite().all()
        digest.update(weight.numpy().tobytes())
    return Seen(
        moved("weights"), tensor, moved("moments"), moved("rate"), moved("average"), run.engine.guard.skipped,
        digest.hexdigest(), message,
    )  # fmt: skip
