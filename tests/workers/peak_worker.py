"""Started by DeepSpeed's launcher in test_plan_peak.py: bytes that whole updates of MiniCanvas take at their peak.

Usage: deepspeed --num_gpus 1 peak_worker.py FOLDER; writes FOLDER/peaks.json. Measured: all tensors that are
alive before an update, and what PyTorch's allocator sees during it.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
sys.path[:0] = [str(p) for p in (ROOT, ROOT / "kernels", TESTS / "support", TESTS / "workers", TESTS / "mutation")]

from fastunlearn.utils.environment import prepare_environment

if __name__ == "__main__":
    prepare_environment(1)

import torch
from plan_worker import storage_bytes
from tiny_run import start_anew
from torch.profiler import ProfilerActivity, profile

from fastunlearn.config import Config, load_config
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.training.setup import Run, prepare
from fastunlearn.training.trainer import one_update
from fastunlearn.utils.distributed import disconnect, init_distributed

SURGERY = ("--surgery.enabled", "true", "--surgery.rho", "1", "--retain.batch_size", "4")
FULL = ("--train.scope", "full")
TWICE = ("--gradient_accumulation_steps", "2", "--train_batch_size", "4")
META = ("--meta.enabled", "true", "--meta.num_images", "12")
CASES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "stage 0, surgery": ("--zero.stage", "0", *SURGERY),
    "stage 1, two micro-batches": (*FULL, *SURGERY, *TWICE),
    "stage 2, two micro-batches": (*FULL, *SURGERY, *TWICE, "--zero.stage", "2"),
    "stage 2, offload": (*FULL, *SURGERY, "--zero.stage", "2", "--zero.offload_optimizer", "cpu"),
    "stage 3, surgery": ("--zero.stage", "3", *SURGERY),
    "bf16": (*FULL, *SURGERY, "--mixed_precision", "bf16"),
    "checkpointing, batch 16": ("--model.gradient_checkpointing", "true", "--train_batch_size", "16"),
    "meta": (*FULL, *SURGERY, *META, "--meta.batch_size", "6"),
    "after an edit, meta": ("--method", "uce", *FULL, *SURGERY, *META),
    "fused": ("--engine", "fused", *FULL, *SURGERY),
    "fused, bf16, 8-bit, batch 8": (
        "--engine", "fused", *FULL, *SURGERY, "--mixed_precision", "bf16", "--optimizer.name", "adamw8bit",
        "--train_batch_size", "8",
    ),
    "fused, meta": ("--engine", "fused", *FULL, *META),
}  # fmt: skip


def config(case: str) -> Config:
    """Every update trains on augmented prompts: then the trajectory needs one more prediction than otherwise."""
    small = (
        "--retain.num_images", "8", "--retain.num_inference_steps", "2", "--prompts.augment_fraction", "1",
        "--kscu.start", "4", "--sampler.num_inference_steps", "50",
        "--progress.stop", "false",  # the weights of the best probe come after what is measured here
    )  # fmt: skip
    return load_config(str(ROOT / "configs" / "minicanvas_object.toml"), [*small, *CASES[case]])


def alive() -> int:
    """Bytes of all tensors' storages, each once."""
    gc.collect()
    return storage_bytes(found for found in gc.get_objects() if isinstance(found, torch.Tensor))


def beyond(run: Run, step: KeyStep) -> int:
    """Bytes that an update takes at its peak, beyond those that are there before it."""
    if step.restart:
        run.rollout.restart(step)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        one_update(run, step)
    assert seen.profiler is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure(case: str) -> int:
    """The peak of the third update: the first two allocate what stays."""
    start_anew()
    run = prepare(config(case), init_distributed())
    for step in run.table[:2]:
        if step.restart:
            run.rollout.restart(step)
        one_update(run, step)
    return alive() + beyond(run, run.table[2])


def main(folder: Path) -> None:
    """One case after the other; between them nothing is left, as each takes what is alive for its own."""
    peaks = {}
    for case in CASES:
        before = alive()
        peaks[case] = measure(case) - before
    (folder / "peaks.json").write_text(json.dumps(peaks))
    disconnect()


if __name__ == "__main__":
    main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--"))))
