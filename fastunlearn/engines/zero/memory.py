"""How many bytes of weights, gradients and optimizer state one rank holds, at each ZeRO stage.

Arithmetic on the sizes of the U-Net's tensors, following what DeepSpeed 0.19 and our own ``shards.py`` and
``gradients/buffer.py`` allocate. How tensors are cut is in ``partition.py``, what an optimizer keeps in its own file.
Nothing here allocates anything or imports DeepSpeed.
"""

from __future__ import annotations

from dataclasses import replace

from fastunlearn.config import Config
from fastunlearn.denoisers.teacher import teacher_rows
from fastunlearn.engines.zero.partition import rank_partitions
from fastunlearn.gradients.buffer import stored_nbytes
from fastunlearn.utils.dtypes import DTYPES
from fastunlearn.utils.memory_rows import AFTER_RETAIN, ALWAYS, FP32, PHASES, Row, Sizes, peak

PLAIN_REDUCTION = 500_000_000  # elements that stage 0 copies, whatever zero.reduce_bucket_size is: DeepSpeed's own
LIVE_PARAMETERS = 10**9  # and gathers at most so many at a time


class ZeroMemory:
    """The rows of one rank."""

    def __init__(self, cfg: Config, sizes: Sizes, world: int, rank: int) -> None:
        self.cfg, self.sizes, self.world = cfg, sizes, world
        self.stage = cfg.zero_stage
        self.parts = rank_partitions(sizes, self.stage, world, rank)
        self.offload = cfg.zero.offload_optimizer != "none"
        self.compute = DTYPES[cfg.weight_dtype].itemsize
        self.accumulate = FP32 if cfg.zero.grad_accum_dtype == "fp32" else self.compute
        self.owned = sum(part.numel for part in self.parts)
        self.exact = sum(sum(part.pieces) for part in self.parts)
        # bf16 gradients that are added up in fp32 lie in one flat buffer, all others in whole tensors.
        self.compact = 0 < self.stage < 3 and self.accumulate != self.compute
        self.bucket = min(cfg.zero.reduce_bucket_size, sum(sizes.trained)) * self.compute if self.stage else 0

    def rows(self) -> list[Row]:
        """The whole table but for activations; rows of no size are left out."""
        found = [*self._weights(), *self._gradients(), *self._kept(), *self._update()]
        return [row for row in found if row.device or row.host]

    def _weights(self) -> list[Row]:
        size, kind = self.compute, self.cfg.weight_dtype
        total = self.sizes.total
        weights = self._sharded_weights() * size
        masters = self.owned * FP32 if self.stage > 0 else 0  # a copy, even of weights that are fp32 themselves
        state, host_state = self._optimizer_state()
        rows = [
            Row(f"U-Net weights ({kind})", weights),
            *(teacher_rows(self.cfg, self.sizes, size) if self.stage < 3 else []),
            Row("teacher: a whole U-Net (stage 3)", total * size if self.stage == 3 else 0),
            self._placed("fp32 master weights", masters),
            Row(f"optimizer state ({self.cfg.optimizer.name})", state, host_state),
        ]
        if self.offload and self.stage < 3:
            largest = max(self.sizes.trained) * size
            rows.append(Row("buffers of the offload", largest, self.owned * size + largest))
        if self.stage == 3 and self.world > 1:
            gathered = min(total, LIVE_PARAMETERS) * size
            rows.append(Row("parameters gathered at a time, at most", gathered, phases=("backward",)))
        return rows

    def _sharded_weights(self) -> int:
        if self.stage == 0:
            return self.sizes.total
        if self.stage == 3:
            return sum(-(-n // self.world) for n in (*self.sizes.trained, *self.sizes.frozen))
        return sum(self.sizes.frozen) + self.owned * self.world

    def _optimizer_state(self) -> tuple[int, int]:
        """(on the device, on the host)"""
        spec = self.cfg.optimizer_spec
        sizes = [spec.state_bytes(part.numel, part.bits, self.stage > 0) for part in self.parts]
        device, host = (sum(side) for side in zip(*sizes, strict=True))
        return (0, device + host) if self.offload else (device, host)

    def gradient_bytes(self) -> int:
        """The averaged gradient that this rank holds after a window."""
        if self.stage == 0 or self.stage == 3:
            return self.owned * self.accumulate
        if self.compact:
            return self.owned * FP32
        # One buffer with the whole of every parameter of which this rank owns a piece.
        return sum(part.whole for part in self.parts) * self.compute

    def _gradients(self) -> list[Row]:
        cfg, trained = self.cfg, sum(self.sizes.trained) * self.compute
        several, overlap = cfg.train.gradient_accumulation_steps > 1, cfg.zero.overlap_comm
        if self.stage == 0:
            copy = min(sum(self.sizes.trained), PLAIN_REDUCTION) * FP32
            return [Row("gradients", trained, phases=PHASES), Row("reduction buffer", copy, phases=("reduce",))]
        if self.stage == 3:
            flat = self.gradient_bytes()
            fp32 = self.owned * FP32 if self.offload else 0
            return [
                Row("gradients", 0 if self.offload else flat, flat + fp32 if self.offload else 0, PHASES),
                Row("reduction bucket", self.bucket),
                Row("copy of the reduction bucket", self.bucket, phases=("backward", "reduce")),
            ]
        # Without overlap stage 1 keeps whole gradients until the end of the window; otherwise they go as they come.
        whole = self.stage == 1 and (several or not overlap)
        after = PHASES[1:] if whole else PHASES
        buckets = self.bucket * (2 if overlap else 1)
        name = "reduction buckets" if overlap else "reduction bucket"
        rows = [Row(name, buckets, phases=("backward",) if whole else ("backward", "reduce"))]
        if whole:
            rows.append(Row("whole gradients, before they are reduced", trained, phases=("backward", "reduce")))
            # What is in the first bucket is no longer elsewhere.
            rows.append(Row("second reduction bucket", buckets - self.bucket, phases=("reduce",)))
        if self.offload:
            added = sum(part.whole for part in self.parts) * self.compute if several else 0
            flat = self.owned * FP32 if self.compact else 0
            return [*rows, Row("gradients", flat, self.owned * FP32 + (0 if self.compact else added), after)]
        rows.append(Row("gradients", self.gradient_bytes(), phases=after))
        if self.stage == 2 and several and not self.compact:
            rows.append(Row("gradients of the next micro-batch", self.gradient_bytes(), phases=("backward", "reduce")))
        return rows

    @property
    def _piece_dtype(self) -> int:
        """Bytes per element of the pieces that surgery is handed."""
        return FP32 if self.offload or self.stage == 0 else self.accumulate

    @property
    def _taken_without_copy(self) -> bool:
        return self.stage < 3 and not self.offload

    def kept_bytes(self) -> int:
        """The retain gradient as its buffer stores it; 0 without surgery."""
        if not self.cfg.retains:
            return 0
        if self._same_tensors:
            return self.gradient_bytes()
        dtype, came = self.cfg.surgery.retain_dtype, self._as_it_came
        return sum(stored_nbytes(dtype, piece, came) for part in self.parts for piece in part.pieces)

    @property
    def _as_it_came(self) -> int:
        """Bytes per element of what the buffer is handed: an average is made in fp32."""
        return FP32 if self.cfg.surgery.retain_ema else self._piece_dtype

    @property
    def _stored_size(self) -> int:
        """Bytes per element of what it keeps, or makes int8 of."""
        dtype = self.cfg.surgery.retain_dtype
        return stored_nbytes("auto" if dtype == "int8" else dtype, 1, self._as_it_came)

    @property
    def _same_tensors(self) -> bool:
        """Whether what is kept is the very buffer that DeepSpeed gave away."""
        surgery = self.cfg.surgery
        plain = surgery.retain_dtype != "int8" and not surgery.retain_ema
        return plain and self._taken_without_copy and self._stored_size == self._piece_dtype

    def _kept(self) -> list[Row]:
        if not self.cfg.retains:
            return []
        surgery, kept = self.cfg.surgery, self.kept_bytes()
        away = surgery.retain_device == "host" and not self.offload
        copy = 0 if self._taken_without_copy else self.exact * self._piece_dtype
        converted = surgery.retain_dtype == "int8" or self._stored_size != self._piece_dtype
        mean = self.exact * FP32 if surgery.retain_ema else 0
        beside = copy + mean + (kept if converted and not (mean and self._stored_size == FP32) else 0)
        if mean and (surgery.retain_dtype in ("int8", "bf16") or away):
            beside += mean  # the old mean, in fp32
        label = f"retain gradient ({surgery.retain_dtype if surgery.retain_dtype != 'auto' else 'as it came'})"
        # Without an average it comes with its own window, and is gone after the projection.
        phases: tuple[str, ...] = ALWAYS if surgery.retain_ema else PHASES[: PHASES.index("update")]
        windows = () if surgery.retain_ema else AFTER_RETAIN
        if away and not surgery.retain_ema:
            phases = tuple(phase for phase in phases if phase != "keep")  # a row of its own below
        row = Row(label, host=kept, phases=phases) if away else self._placed(label, kept, phases)
        rows = [replace(row, windows=windows)]
        rows.append(self._placed("retain gradient: copies when it is taken", beside, ("keep",)))
        if away:
            rows.append(Row("retain gradient, on its way to the host", host=kept, phases=("keep",)))
            rows.append(Row("retain gradient, brought back", kept, phases=("project",)))
        dequantized = self.cfg.optimizer_spec.dequantized_bytes
        if surgery.metric == "optimizer" and dequantized:
            extra = self.owned * FP32 + max(part.numel for part in self.parts) * dequantized
            rows.append(Row("second moments out of 8 bits", extra, phases=("project",)))
        return rows

    def _update(self) -> list[Row]:
        """The optimizer steps one part after the other, with temporaries as large as the part."""
        largest = max(part.numel for part in self.parts)
        temporaries = self.cfg.optimizer_spec.temporary_bytes * largest
        if self.offload or self.stage == 0:
            return [self._placed("the optimizer's temporaries", temporaries, ("update",))]
        if self.compact:
            gradient, making = 0, 0
        else:
            gradient = largest * FP32
            making = largest * (self.accumulate + FP32 if self.accumulate < FP32 else FP32)
        label = "fp32 gradient and temporaries, a group at a time"
        return [Row(label, max(making, gradient + temporaries), phases=("update",))]

    def _placed(self, name: str, size: int, phases: tuple[str, ...] = ALWAYS) -> Row:
        """On the host where the optimizer is offloaded, else on the device."""
        return Row(name, 0 if self.offload else size, size if self.offload else 0, phases)


def gradients_of_one_pass(cfg: Config, sizes: Sizes, world: int) -> int:
    """Bytes of gradients that one backward pass makes from nothing and keeps, one weight after the other; 0 where less
    than all of them are kept, or nobody knows which come first."""
    several = cfg.train.gradient_accumulation_steps > 1
    whole = cfg.zero_stage == 0 or (cfg.zero_stage == 1 and not cfg.zero.overlap_comm)
    next_batch = cfg.zero_stage == 2 and world == 1 and several and cfg.zero.offload_optimizer == "none"
    if not (next_batch or (whole and not several)):
        return 0
    return sum(sizes.trained) * DTYPES[cfg.weight_dtype].itemsize


def rows_of_the_largest_rank(cfg: Config, sizes: Sizes, world: int) -> list[Row]:
    """The rows of the rank that needs most."""
    return max((ZeroMemory(cfg, sizes, world, rank).rows() for rank in range(world)), key=peak)
