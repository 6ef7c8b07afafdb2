"""Which implementation of an op runs: the Triton kernels or the plain PyTorch reference. Logged once, with the reason.

`FASTUNLEARN_KERNELS=auto` (the default) runs Triton on CUDA and ROCm tensors and the reference everywhere else;
`reference` and `triton` force one of the two. Under `TRITON_INTERPRET=1`, set before this package is imported, Triton
runs on CPU tensors too, slowly: that is how the tests prove the kernels without a GPU. fp64 always takes the reference,
since the kernels compute in fp32.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

CHOICES = ("auto", "reference", "triton")
VARIABLE = "FASTUNLEARN_KERNELS"
# Triton decides at import, when a kernel is decorated.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

_log = logging.getLogger("fastunlearn_kernels")
_forced: list[str] = []


def choice() -> str:
    """auto, reference or triton. Raises ValueError if the environment asks for anything else."""
    asked = _forced[-1] if _forced else os.environ.get(VARIABLE, "auto")
    if asked not in CHOICES:
        raise ValueError(f"{VARIABLE}={asked!r} is unknown; it may be {', '.join(CHOICES)}")
    return asked


@contextlib.contextmanager
def force(name: str) -> Iterator[None]:
    """Run every op inside the block with one backend, whatever the environment says: for tests and benchmarks."""
    if name not in CHOICES:
        raise ValueError(f"unknown backend {name!r}; it may be {', '.join(CHOICES)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def runs_triton(tensors: Sequence[Tensor | None]) -> bool:
    """Whether an op on these tensors launches its Triton kernel.

    Raises ValueError if they lie on several devices, RuntimeError if Triton is demanded where it cannot run.
    """
    present = [t for t in tensors if t is not None]
    devices = {t.device for t in present}
    if len(devices) > 1:
        raise ValueError(f"the tensors lie on several devices: {', '.join(sorted(map(str, devices)))}")
    asked, on_gpu = choice(), bool(present) and present[0].is_cuda
    if asked == "reference" or not present:
        return False
    if any(t.dtype == torch.float64 for t in present):
        _say("reference", "float64: the kernels compute in float32")
        return False
    if asked == "auto" and not on_gpu:
        _say("reference", f"auto: tensors on {present[0].device.type}")
        return False
    if not on_gpu and not INTERPRETED:
        raise RuntimeError(
            f"{VARIABLE}=triton needs CUDA or ROCm tensors, these are on {present[0].device.type}; use auto, or set "
            "TRITON_INTERPRET=1 before the import to interpret the kernels"
        )
    where = "the interpreter" if INTERPRETED else f"tensors on {present[0].device.type}"
    _say("triton", f"{asked}: {where}, triton {triton.__version__}")
    return True


def describe(device: torch.device) -> str:
    """What runs on tensors of this device, with the reason: "reference (auto: cpu)"."""
    asked = choice()
    name = asked if asked != "auto" else "triton" if device.type == "cuda" else "reference"
    return f"{name} ({asked}: {device.type})"


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """The context of a launch: Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def _say(name: str, reason: str) -> None:
    _log.info("kernels: %s (%s)", name, reason)
