"""The training loop that all stages of `fastunlearn minicanvas rebuild` share.

AdamW with warm-up and cosine, gradient clipping, an exponential moving average of the weights, and checkpoints from
which an interrupted stage goes on. On a CPU the work is spread over single-thread processes whose gradients are
averaged with gloo: two-thread convolutions on a busy machine can be ten times slower than two one-thread processes.
It is not the trainer of the erasure methods (`fastunlearn/training/trainer.py`).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from tqdm import tqdm

from fastunlearn.minicanvas.build.editions import FitPlan
from fastunlearn.utils.environment import NOISY_LOGGERS, QUIET

# Without these the C library hands large buffers back to the kernel after every operation (measured: 10 to 20 %).
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "2000000000")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "20000000000")
os.environ.setdefault("MALLOC_TOP_PAD_", "200000000")


@dataclass(frozen=True)
class Worker:
    """Which of the processes this is and where it computes."""

    rank: int
    world: int
    device: torch.device

    def generator(self, plan: FitPlan, step: int) -> torch.Generator:
        """The random numbers of one step in this process: a resumed run draws the same ones."""
        return torch.Generator().manual_seed((plan.seed * 1_000_003 + step) * 64 + self.rank)


def hush() -> None:
    """Keep the notices of libraries that nobody can act on off the terminal; call it before they are imported."""
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # found by itself, it warns
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 where the matrix units make it faster (CUDA, AMX), else full precision."""
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def launch(function: Callable[..., None], arguments: tuple, processes: int) -> None:
    """Call `function(worker, *arguments)` once on a GPU if there is one, else in `processes` CPU processes."""
    if torch.cuda.is_available():
        function(Worker(0, 1, torch.device("cuda")), *arguments)
    elif processes == 1:
        function(Worker(0, 1, torch.device("cpu")), *arguments)
    else:
        with tempfile.TemporaryDirectory() as folder:
            name = (function.__module__, function.__qualname__)
            mp.spawn(_enter, (name, arguments, processes, f"file://{folder}/meet"), nprocs=processes)


def _enter(rank: int, name: tuple[str, str], arguments: tuple, world: int, meeting: str) -> None:
    hush()
    function = getattr(importlib.import_module(name[0]), name[1])  # only now: it imports the noisy libraries
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    try:
        function(Worker(rank, world, torch.device("cpu")), *arguments)
    finally:
        dist.destroy_process_group()


class Fit:
    """The state of one stage: model, optimizer, averaged weights and the step that comes next."""

    def __init__(self, model: nn.Module, plan: FitPlan, worker: Worker, checkpoint: Path) -> None:
        self.model, self.plan, self.worker, self.checkpoint = model.to(worker.device), plan, worker, checkpoint
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.averages = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=plan.weight_decay, foreach=True
        )
        self.step = 0
        if checkpoint.exists():
            self._load()

    def run(self, loss: Callable[[int], Tensor], after: Callable[[Fit], None] | None = None) -> None:
        """Train to the end of the plan; `loss(step)` gives this process's loss, `after` looks in after every step."""
        bar = tqdm(total=self.plan.steps, initial=self.step, desc=self.plan.name, disable=self.worker.rank > 0)
        saved, smooth = time.monotonic(), 0.0
        while self.step < self.plan.steps:
            value = loss(self.step)
            value.backward()
            self._update()
            bar.update()
            smooth = value.item() if not smooth else 0.98 * smooth + 0.02 * value.item()
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            if after is not None:
                after(self)
            if self.worker.rank == 0 and time.monotonic() - saved > self.plan.save_seconds:
                self.save()
                saved = time.monotonic()
        bar.close()
        if self.worker.rank == 0:
            self.save()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with its averaged weights, for looking at it or keeping it."""
        current = [p.detach().clone() for p in self.parameters]
        self._copy(self.averages)
        try:
            yield self.model
        finally:
            self._copy(current)

    def save(self) -> None:
        """Write the checkpoint beside the old one and rename it."""
        state = {
            "step": self.step,
            "model": [p.detach() for p in self.parameters],
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.worker.device, weights_only=True)
        self.step = state["step"]
        self._copy(state["model"])
        self.averages = state["averages"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _copy(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, values)

    def _update(self) -> None:
        if self.worker.world > 1:
            self._average_gradients()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate * self._schedule()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.plan.ema, (1 + self.step) / (10 + self.step))  # the first weights are forgotten sooner
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    def _schedule(self) -> float:
        if self.step < self.plan.warmup:
            return (self.step + 1) / self.plan.warmup
        progress = (self.step - self.plan.warmup) / max(1, self.plan.steps - self.plan.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))

    def _average_gradients(self) -> None:
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.worker.world
        offset = 0
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = flat[offset : offset + gradient.numel()].view_as(gradient)
            offset += gradient.numel()
