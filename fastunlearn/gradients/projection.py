"""Gradient surgery: the unlearning gradient gives up what it would do against the gradient of what must be kept.

What this is: DoCo's rule (arXiv 2405.15304) on the shards that ZeRO leaves on each rank. Dot products are taken on this
rank's pieces, added up over ranks as one small fp64 table, and turned into one coefficient per segment; the projection
and the clipping are one pass over the unlearning gradient, in place.
What this is not: where the pieces come from (``gradient_shards.py``), the kernels (``fastunlearn_kernels``), or where
the retain gradient's samples come from (``retain.py``).

Legend, per segment (a tensor, a block of the U-Net, or everything), u the unlearning and r the retain gradient:
    c  = strength * min(0, <u, r>) / <r, r>             one-sided; two-sided without the min
    u' = u - c r + rho r, clipped to train.max_grad_norm by its norm in closed form
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastunlearn.config import SurgeryConfig
from fastunlearn.engines.zero_shards import Piece
from fastunlearn.errors import UserError
from fastunlearn.gradients.buffer import GradientBuffer
from fastunlearn.utils.distributed import World, sum_over_ranks
from fastunlearn_kernels import Plan, Quantized, Segments, surgery_apply, surgery_coefficients, surgery_dots

# Surgery's pass with nothing to project, to add one gradient to another.
ADDITION = SurgeryConfig(projection="none", rho=1.0)
BLOCK = re.compile(r"((?:down|up)_blocks\.\d+\.[a-z]+\.\d+|mid_block\.[a-z]+\.\d+)")


def block_of(name: str) -> str:
    """The block of the U-Net that a parameter belongs to, such as ``down_blocks.1.attentions.0``."""
    found = BLOCK.match(name)
    return found[1] if found else name.partition(".")[0]


def segment_names(names: Sequence[str], granularity: str) -> list[str]:
    """What each parameter's segment is called: its own name, its block's, or ``all``."""
    if granularity == "tensor":
        return list(names)
    return [block_of(name) for name in names] if granularity == "block" else ["all"] * len(names)


@dataclass
class Figures:
    """One update's evidence, still on the device. ``table``: (segments, 3) uu, ur, rr before the projection."""

    table: Tensor
    plan: Plan

    @property
    def cosine(self) -> Tensor:
        """Between the two gradients as wholes; 0 where one of them is."""
        uu, ur, rr = self.table[:, :3].sum(0)
        return torch.where(uu * rr > 0, ur / (uu * rr).sqrt(), torch.zeros_like(ur))

    @property
    def conflicting_share(self) -> Tensor:
        """Share of the segments in which the gradients point against each other."""
        return (self.table[:, 1] < 0).double().mean()

    def cosine_of_blocks(self, block_of_segment: Tensor, count: int) -> Tensor:
        """(blocks,) cosine between the gradients in each block; ``block_of_segment`` (segments,) int64."""
        sums = torch.zeros(count, 3, dtype=self.table.dtype, device=self.table.device)
        sums.index_add_(0, block_of_segment.to(self.table.device), self.table[:, :3])
        uu, ur, rr = sums.unbind(1)
        return torch.where(uu * rr > 0, ur / (uu * rr).sqrt(), torch.zeros_like(ur))

    @property
    def retain_grad_norm(self) -> Tensor:
        """Norm of the retain gradient."""
        return self.table[:, 2].sum().sqrt()


def coefficients(cfg: SurgeryConfig, table: Tensor, bias_correction: float, max_norm: float | None) -> Plan:
    """What the configured projection does with a table of inner products."""
    return surgery_coefficients(
        table,
        strength=0.0 if cfg.projection == "none" else cfg.strength,
        two_sided=cfg.two_sided,
        released=cfg.projection == "released",
        rho=cfg.rho / bias_correction,
        max_norm=max_norm,
    )


class Surgery:
    """The retain gradient that is kept, and the projection."""

    def __init__(self, cfg: SurgeryConfig, max_grad_norm: float, names: Sequence[str], world: World, sharded: bool):
        self.cfg = cfg
        self.max_grad_norm = max_grad_norm
        self.world = world
        self.sharded = sharded
        of_parameter = segment_names(names, cfg.granularity)
        self.segments = list(dict.fromkeys(of_parameter))
        index = {segment: i for i, segment in enumerate(self.segments)}
        self._segment = {name: index[segment] for name, segment in zip(names, of_parameter, strict=True)}
        self.kept = GradientBuffer(cfg)
        self._skipped = 0
        self.skipped = 0

    def keep(self, pieces: list[Piece]) -> None:
        """Take over a retain gradient."""
        self.kept.keep([piece.tensor for piece in pieces])

    def project(self, pieces: list[Piece], second_moments: list[Tensor] | None, epsilon: float) -> Figures:
        """Edit this rank's unlearning gradient in place. Collective."""
        unlearn = [piece.tensor for piece in pieces]
        segments = self._cut(pieces)
        retain = self.retained(unlearn[0].device if unlearn else self.world.device)
        weighted = self.cfg.metric == "optimizer" and second_moments is not None
        table = surgery_dots(unlearn, retain, segments, second_moment=second_moments if weighted else None, eps=epsilon)
        if self.sharded:  # with offload the gradients are on the host, where the group of a GPU run has no backend
            table = sum_over_ranks(table.to(self.world.device)).to(table.device)
        plan = coefficients(self.cfg, table, self.kept.bias_correction, self.max_grad_norm or None)
        surgery_apply(unlearn, retain, segments, plan)
        self.kept.release()
        return Figures(table, plan)

    def retained(self, place: torch.device) -> list[Tensor] | Quantized | None:
        """The gradient that was kept, on this device."""
        return self.kept.at(place)

    def is_finite(self, figures: Figures) -> bool:
        """Whether the update may be applied: the same answer on every rank, since the table is. Waits for the device.

        Raises:
            UserError: too many updates in a row were not.
        """
        if not bool(figures.plan.found_inf):
            self._skipped = 0
            return True
        self._skipped += 1
        self.skipped += 1
        if not bool(figures.retain_grad_norm.isfinite()):
            self.kept.forget()
        if self._skipped >= self.cfg.max_skipped_updates:
            raise UserError(
                f"the unlearning or the retain gradient was not finite in {self._skipped} updates in a row "
                "(surgery.max_skipped_updates): lower train.learning_rate, or use model.mixed_precision 'no'; nothing "
                "was exported"
            )
        return False

    def state_dict(self) -> dict[str, Tensor]:
        """The running mean of the retain gradient, if there is one."""
        return self.kept.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue it."""
        self.kept.load_state_dict(state, self.world.device)

    def _cut(self, pieces: list[Piece]) -> Segments:
        rows = tuple((i, 0, piece.tensor.numel(), self._segment[piece.name]) for i, piece in enumerate(pieces))
        return Segments(rows, len(self.segments))
