"""The rows of a memory plan: who needs how many bytes in which phase of an update; and what they come to.

Whoever holds memory reports rows; the planner adds them up. An update goes through phases, and its memory is that of
the largest. A row of the table says in which phases it exists:
    attack      the meta term's simulated attack, when no gradient of the engine is alive
    backward    forward and backward pass of a window       reduce    the gradient's mean over ranks
    keep        the retain gradient is stored               project   surgery reads both gradients
    update      the optimizer's step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PHASES = ("backward", "reduce", "keep", "project", "update")
ALWAYS = ("attack", *PHASES)
# What calls the U-Net, in this order; trajectories move on last, or restart first of all.
AFTER_META = ("retain", "unlearning", "trajectories")
AFTER_RETAIN = AFTER_META[1:]
FP32 = 4  # bytes


@dataclass(frozen=True)
class Row:
    """A line of the table, in bytes."""

    name: str
    device: int = 0
    host: int = 0
    phases: tuple[str, ...] = ALWAYS
    windows: tuple[str, ...] = ()
    """The calls of the U-Net in those phases, one of which runs at a time, in which it exists; none given: all."""


@dataclass(frozen=True)
class Sizes:
    """Elements of the U-Net's tensors: the trained ones by name group, as ``parameter_groups`` makes them."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    """(bits of 8-bit optimizers' state, elements of each tensor) of every group."""
    frozen: tuple[int, ...]
    layers: tuple[tuple[int, ...], ...] = ()
    """Elements of the tensors that the fused engine steps together, but for the small ones."""

    @property
    def trained(self) -> tuple[int, ...]:
        """Elements of each trained tensor."""
        return tuple(numel for _, numels in self.groups for numel in numels)

    @property
    def total(self) -> int:
        """Elements of the whole U-Net."""
        return sum(self.trained) + sum(self.frozen)


def totals(rows: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """(device, host) bytes in each phase, in the window of it that needs most of the device; without a meta term there
    is no attack."""
    attacked = any("attack" in row.phases and row.phases != ALWAYS for row in rows)
    phases = ALWAYS if attacked else PHASES
    return {phase: _largest_window([row for row in rows if phase in row.phases]) for phase in phases}


def _largest_window(rows: Sequence[Row]) -> tuple[int, int]:
    found = []
    for window in {window for row in rows for window in row.windows} or {""}:
        there = [row for row in rows if not row.windows or window in row.windows]
        found.append((sum(row.device for row in there), sum(row.host for row in there)))
    return max(found)


def peak(rows: Sequence[Row]) -> tuple[int, int]:
    """The largest device figure, and the largest host figure, of any phase."""
    figures = totals(rows).values()
    return max(device for device, _ in figures), max(host for _, host in figures)


def blocks_of(numel: int) -> int:
    """Groups of elements that share a scale in the kernels' 8-bit forms."""
    from fastunlearn_kernels import QUANT_BLOCK

    return -(-numel // QUANT_BLOCK)


def quantized_nbytes(numel: int) -> int:
    """Bytes of a tensor as the kernels' ``blockwise_quantize`` stores it: its elements, padded to whole blocks, and an
    fp32 scale for each block."""
    from fastunlearn_kernels import QUANT_BLOCK

    return blocks_of(numel) * (QUANT_BLOCK + FP32)
