"""Removes one line of the surgery protocol at a time, to see that the matrix notices. Not a test itself.

A mutation replaces a piece of text in a module's source, runs the source as a module of its own, and puts its classes
in the place of the real ones for one case.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    """`old`, which occurs once in the module, becomes `new`; then `case` must miss the reference."""

    what: str
    module: str
    old: str
    new: str
    case: str


SHARDS, ZERO = "fastunlearn.engines.zero.shards", "fastunlearn.engines.zero.engine"
TRANSFORMS, STATS = "fastunlearn.gradients.transforms", "fastunlearn.gradients.stats"
MUTATIONS = (
    Mutation("stage 0 keeps the retain gradient in place", SHARDS, "parameter.grad = None\n", "pass\n", "stage0-k1"),
    Mutation(
        "stage 2 leaves the list, into which fp32 gradients are added, with DeepSpeed",
        SHARDS, "optimizer.averaged_gradients[group] = None", "pass", "stage2-k2-fp32",
    ),
    Mutation(
        "stage 3 is not armed for the next window",
        SHARDS, "            optimizer.zero_grad()\n", "", "stage3-k1",
    ),
    Mutation(
        "stage 3 keeps views of the live buffer",
        SHARDS, "shard.tensor.clone()) for shard in shards]\n            optimizer.zero_grad()",
        "shard.tensor) for shard in shards]\n            optimizer.zero_grad()", "stage3-k1",
    ),
    Mutation(
        "stage 1 with offload is not armed", SHARDS, "optimizer.micro_step_id = -1", "pass", "stage1-k1-offload",
    ),
    Mutation(
        "stage 2 with offload is not armed", SHARDS, "optimizer.micro_step_id = -1", "pass", "stage2-k1-offload",
    ),
    Mutation(
        "stage 2 with offload leaves the buffer, into which fp32 gradients are added, with DeepSpeed",
        SHARDS, "for group in optimizer.averaged_gradients:",
        "for group in () if self._offload else optimizer.averaged_gradients:", "stage2-k1-offload-fp32",
    ),
    Mutation(
        "offload keeps views of the live gradient",
        SHARDS, "shard.tensor.clone()) for shard in shards]\n                optimizer.micro_step_id",
        "shard.tensor) for shard in shards]\n                optimizer.micro_step_id", "stage2-k1-offload",
    ),
    Mutation(
        "a partition's first parameter is not cut at its border",
        SHARDS, "min(parameter.numel() - skipped, left)", "min(parameter.numel(), left)", "stage1-k1-offload",
    ),
    Mutation("each rank projects by its own dots", TRANSFORMS, "if self.sharded:", "if False:", "stage2-k1"),
    Mutation("all tensors share a coefficient", STATS, 'if granularity == "tensor":', "if False:", "stage1-k1"),
    Mutation("no clipping", TRANSFORMS, "limit = self.clip.limit if", "limit = None if", "stage1-k1"),
    Mutation(
        "every micro-batch counts as the last", ZERO,
        "set_gradient_accumulation_boundary(last)", "set_gradient_accumulation_boundary(True)", "stage1-k2",
    ),
    Mutation(
        "no micro-batch counts as the last", ZERO,
        "set_gradient_accumulation_boundary(last)", "set_gradient_accumulation_boundary(False)", "stage2-k2",
    ),
    Mutation(
        "the masters start from what bf16 left of the weights", ZERO, "if originals is not None:", "if False:",
        "stage2-k2-fp32",
    ),
    Mutation(
        "a partition's first parameter is filled from its beginning", SHARDS, "begin, length, skipped\n",
        "begin, length, 0\n", "stage2-k2-fp32",
    ),
    Mutation(
        "every rank of stage 3 is filled with the first one's part", SHARDS, "torch.distributed.get_rank() * length",
        "0", "stage3-k1-fp32",
    ),
)  # fmt: skip


@contextlib.contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """The next run is built from the mutated classes."""
    real = importlib.import_module(mutation.module)
    source = Path(str(real.__file__)).read_text(encoding="utf-8")
    if source.count(mutation.old) != 1:
        raise ValueError(f"{mutation.what}: {mutation.old!r} occurs {source.count(mutation.old)} times")
    broken = types.ModuleType(f"broken_{mutation.module.rpartition('.')[2]}")
    sys.modules[broken.__name__] = broken  # dataclasses look their module up
    exec(compile(source.replace(mutation.old, mutation.new), str(real.__file__), "exec"), broken.__dict__)
    users = ((ZERO, "ZeroEngine"), (ZERO, "build_transforms"), (ZERO, "GradientShards"), (TRANSFORMS, "segment_names"))
    places = [(importlib.import_module(module), name) for module, name in users]
    before = [(module, name, getattr(module, name)) for module, name in places]
    for module, name in places:
        if name in broken.__dict__:
            setattr(module, name, broken.__dict__[name])
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
