"""Which attention backend can run where: the refusals, known before PyTorch or any weights are loaded.

One table, and one function that looks up nothing but whether a package is installed. Attention itself is
``acceleration/attention.py``, which also tries an explicit choice once on the device.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from fastunlearn.schema.fields import AttentionBackend

CHOICES: tuple[str, ...] = get_args(AttentionBackend)
UNFUSED: tuple[AttentionBackend, ...] = ("eager", "sdpa-math")
"""Plain operations: they keep the whole (N, M) matrix of scores, and have a second derivative."""
Capability = tuple[int, int]


@dataclass(frozen=True)
class Needs:
    """What a backend asks of the machine; everything that is not listed runs anywhere."""

    capability: Capability
    """Oldest GPU generation that it has kernels for."""
    only_major: bool = False
    """Whether later generations have none either."""
    on_cpu: bool = False
    """Whether PyTorch has a kernel of that name for the CPU, which then computes in any floating dtype."""
    sixteen_bit: bool = False
    """Whether its GPU kernels compute in bf16 and fp16 only."""
    package: str = ""
    """Module that must be installed."""
    remedy: str = ""
    """How to get that module."""


# Generations and dtypes as PyTorch's own checks state them (sdp_utils.cpp, torch.nn.attention); xformers dropped 7.0 in
# its release 0.0.31.
NEEDS = {
    "sdpa-flash": Needs(capability=(8, 0), on_cpu=True, sixteen_bit=True),
    "sdpa-cudnn": Needs(capability=(8, 0), sixteen_bit=True),
    "sdpa-efficient": Needs(capability=(5, 0)),
    "xformers": Needs(capability=(7, 5), package="xformers", remedy="install the 'gpu' extra"),
    "flash3": Needs(
        capability=(9, 0), only_major=True, sixteen_bit=True, package="flash_attn_interface",
        remedy="install a FlashAttention-3 wheel made for this PyTorch",
    ),
}  # fmt: skip


def is_installed(module: str) -> bool:
    """Whether ``module`` can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def attention_refusal(
    choice: str,
    device: str,
    dtype: str,
    capability: Capability | None = None,
    installed: Callable[[str], bool] = is_installed,
) -> str | None:
    """Why ``model.attention = choice`` cannot be met, in one line with the remedy; None: nothing speaks against it.

    Args:
        choice: one of ``CHOICES``.
        device: "cpu" or "cuda".
        dtype: "fp32", "bf16" or "fp16", in which the U-Net's products are computed (autocast counts).
        capability: the GPU's; None: not known yet, and not judged.
        installed: whether a module can be found.
    """
    needs = NEEDS.get(choice)
    if needs is None:
        return None
    field = f"model.attention: {choice!r}"
    if device != "cuda":
        if needs.on_cpu:
            return None
        return f"{field} needs a GPU and none was found; use 'auto' or 'sdpa'"
    if needs.package and not installed(needs.package):
        return f"{field} needs the module {needs.package!r}, which is not installed; {needs.remedy}, or use 'auto'"
    if needs.sixteen_bit and dtype not in ("bf16", "fp16"):
        return (
            f"{field} computes in 16 bits only, and model.mixed_precision is 'no'; "
            "set model.mixed_precision to 'bf16', or use 'auto' or 'sdpa-efficient'"
        )
    if capability is not None and not _has_kernels(needs, capability):
        which = "is made for" if needs.only_major else "needs at least"
        return (
            f"{field} {which} compute capability {_dotted(needs.capability)}, and this GPU has {_dotted(capability)}; "
            "use 'auto' or 'sdpa'"
        )
    return None


def _has_kernels(needs: Needs, capability: Capability) -> bool:
    if needs.only_major and capability[0] != needs.capability[0]:
        return False
    return capability >= needs.capability


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
