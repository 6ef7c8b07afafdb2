"""What is done to an update's gradient before its step: a list of transforms, each one pass over this rank's shards.

``Project`` is gradient surgery, DoCo's rule (arXiv 2405.15304): the unlearning gradient gives up what it would do
against the gradient of what must be kept. ``Add`` adds the meta term's gradient. ``Clip`` is the only owner of
clipping; where a pass comes before it, the factor goes along with that pass.

Legend, per segment (a tensor, a block of the U-Net, or everything), u the unlearning and r the stored gradient:
    c  = strength * min(0, <u, r>) / <r, r>             one-sided; two-sided without the min
    u' = u - c r + rho r, clipped to train.max_grad_norm by its norm in closed form
Inner products are taken on this rank's shards and added up over ranks as one small fp64 table, so that every rank has
the same coefficients. The kernels are in ``fastunlearn_kernels``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.gradients.buffer import GradientBuffer
from fastunlearn.gradients.shard import GradientKind, GradientShard
from fastunlearn.gradients.stats import SurgeryStats, segment_names
from fastunlearn.schema.sections import SurgeryConfig
from fastunlearn.utils.distributed import World, sum_over_ranks
from fastunlearn_kernels import Segments, SurgeryPlan, surgery_apply, surgery_coefficients, surgery_dots
from fastunlearn_kernels.gradients.surgery_coefficients import CLIP_EPS


class Transform(Protocol):
    """One pass: what it reads beside the gradient, and what it makes of the inner products of the two."""

    buffer: GradientBuffer | None
    granularity: str
    preconditioned: bool

    def plan(self, table: Tensor, bias_correction: float, max_norm: float | None) -> SurgeryPlan: ...


class Project:
    """Takes out of the gradient what points against the stored one, and adds ``rho`` times the stored one."""

    def __init__(self, cfg: SurgeryConfig, buffer: GradientBuffer | None = None) -> None:
        self.cfg, self.buffer = cfg, buffer
        self.granularity: str = cfg.granularity
        self.preconditioned = cfg.metric == "optimizer"

    def plan(self, table: Tensor, bias_correction: float, max_norm: float | None) -> SurgeryPlan:
        """``bias_correction``: an average that starts at zero is too small by this factor."""
        cfg = self.cfg
        return surgery_coefficients(
            table,
            strength=0.0 if cfg.projection == "none" else cfg.strength,
            two_sided=cfg.two_sided,
            released=cfg.projection == "released",
            rho=(cfg.rho or 0.0) / bias_correction,
            max_norm=max_norm,
        )


class Add:
    """Adds the stored gradient, where there is one in this update."""

    granularity = "tensor"
    preconditioned = False

    def __init__(self, buffer: GradientBuffer | None = None) -> None:
        self.buffer = buffer

    def plan(self, table: Tensor, bias_correction: float, max_norm: float | None) -> SurgeryPlan:
        """A projection of strength 0, and all of the other gradient."""
        return surgery_coefficients(table, strength=0.0, rho=1.0, max_norm=max_norm)


class Clip:
    """Scales the gradient to at most ``max_norm``, by its global norm over all ranks; 0: only measures it."""

    buffer: GradientBuffer | None = None
    granularity = "all"
    preconditioned = False

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    @property
    def limit(self) -> float | None:
        """As the kernels take it."""
        return self.max_norm or None

    def plan(self, table: Tensor, bias_correction: float, max_norm: float | None) -> SurgeryPlan:
        """Nothing but the factor."""
        return surgery_coefficients(table, strength=0.0, max_norm=max_norm)


class GradientTransforms:
    """The transforms of a run, in order; the last pass clips. Holds the stored gradients of this rank."""

    def __init__(
        self,
        passes: Sequence[Transform],
        clip: Clip,
        names: Sequence[str],
        world: World,
        *,
        sharded: bool,
        stored: dict[GradientKind, GradientBuffer] | None = None,
    ) -> None:
        """
        Args:
            passes: without the clipping; none: the gradient is only measured and clipped.
            names: of all trained parameters.
            sharded: whether other ranks hold the rest of the gradient.
            stored: the buffers of ``passes``, by what they hold.
        """
        self.clip, self.world, self.sharded = clip, world, sharded
        self.passes: list[Transform] = [*passes] or [clip]
        self.stored: dict[GradientKind, GradientBuffer] = dict(stored or {})
        self._segments = {one.granularity: Segmentation(names, one.granularity) for one in self.passes}

    def store(self, kind: GradientKind, shards: Sequence[GradientShard]) -> None:
        """Take over a gradient for later."""
        self.stored[kind].store([shard.tensor for shard in shards])

    def apply(
        self, shards: Sequence[GradientShard], second_moments: list[Tensor] | None = None, epsilon: float = 1e-8
    ) -> list[SurgeryStats]:
        """Edit this rank's gradient in place; what each pass saw. Collective.

        ``second_moments``: AdamW's, for a projection in the optimizer's metric, with its ``epsilon``.
        """
        gradient = [shard.tensor for shard in shards]
        seen = []
        for one in self.passes:
            limit = self.clip.limit if one is self.passes[-1] else None
            seen.append(self._pass(one, shards, gradient, second_moments, epsilon, limit))
        return seen

    def segments_of(self, granularity: str) -> list[str]:
        """What the rows of a table stand for."""
        return self._segments[granularity].names

    def reset_broken(self, seen: Sequence[SurgeryStats]) -> None:
        """After an update that was refused: an average that has met what is not finite would never lose it."""
        for one, stats in zip(self.passes, seen, strict=True):
            if one.buffer is not None and not bool(stats.retain_grad_norm.isfinite()):
                one.buffer.reset()

    def state_dict(self) -> dict[str, Tensor]:
        """The average of the retain gradient, if there is one."""
        return self.stored["retain"].state_dict() if "retain" in self.stored else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue it."""
        self.stored["retain"].load_state_dict(state, self.world.device)

    def _pass(
        self, one: Transform, shards: Sequence[GradientShard], gradient: list[Tensor],
        second_moments: list[Tensor] | None, epsilon: float, limit: float | None,
    ) -> SurgeryStats:  # fmt: skip
        segments = self._segments[one.granularity].cut(shards)
        place = gradient[0].device if gradient else self.world.device
        buffer = one.buffer
        other = buffer.on(place) if buffer is not None and (buffer.is_filled or isinstance(one, Project)) else None
        weights = second_moments if one.preconditioned else None
        table = surgery_dots(gradient, other, segments, second_moment=weights, eps=epsilon)
        if self.sharded:  # with offload the gradients are on the host, where the group of a GPU run has no backend
            table = sum_over_ranks(table.to(self.world.device)).to(table.device)
        plan = one.plan(table, 1.0 if buffer is None else buffer.bias_correction, limit)
        if other is not None or limit is not None:
            surgery_apply(gradient, other, segments, plan)
        if buffer is not None:
            buffer.free()
        return SurgeryStats(table, plan)


def build_transforms(cfg: Config, names: Sequence[str], world: World) -> GradientTransforms:
    """What a configuration asks for, over shards of the parameters ``names``."""
    passes: list[Transform] = []
    stored: dict[GradientKind, GradientBuffer] = {}
    if cfg.retains:
        surgery = cfg.surgery_settings
        stored["retain"] = GradientBuffer(surgery.retain_dtype, surgery.retain_device, surgery.retain_ema)
        passes.append(Project(surgery, stored["retain"]))
    if cfg.has_meta:
        stored["meta"] = GradientBuffer(cfg.meta.gradient_dtype)
        passes.append(Add(stored["meta"]))
    clip = Clip(cfg.train.max_grad_norm)
    return GradientTransforms(passes, clip, names, world, sharded=cfg.zero_stage > 0, stored=stored)


class Segmentation:
    """Which parameters share a coefficient."""

    def __init__(self, names: Sequence[str], granularity: str) -> None:
        of_parameter = segment_names(names, granularity)
        self.names = list(dict.fromkeys(of_parameter))
        index = {segment: i for i, segment in enumerate(self.names)}
        self._row = {name: index[segment] for name, segment in zip(names, of_parameter, strict=True)}

    def cut(self, shards: Sequence[GradientShard]) -> Segments:
        """The kernels' form of it, for these shards."""
        rows = tuple((i, 0, shard.tensor.numel(), self._row[shard.name]) for i, shard in enumerate(shards))
        return Segments(rows, len(self.names))


def clip_scale(norm: Tensor, clip: Clip) -> Tensor:
    """The clipping factor for a gradient of this norm, for an engine that clips by the norm of the update before."""
    return (clip.max_norm / (norm + CLIP_EPS)).clamp(max=1.0)
