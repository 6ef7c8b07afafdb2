"""How many bytes the fused engine holds: weights, teacher, moments, the stored gradient, and one layer of gradients."""

from __future__ import annotations

from fastunlearn.config import Config
from fastunlearn.denoisers.teacher import teacher_rows
from fastunlearn.engines.fused.moments import moment_bytes
from fastunlearn.gradients.buffer import stored_nbytes
from fastunlearn.utils.dtypes import DTYPES
from fastunlearn.utils.memory_rows import FP32, Row, Sizes


def retain_dtype(cfg: Config) -> str:
    """How the retain gradient waits: in 8 bits where nothing else is asked for."""
    return "int8" if cfg.surgery.retain_dtype == "auto" else cfg.surgery.retain_dtype


def fused_rows(cfg: Config, sizes: Sizes) -> list[Row]:
    """The table but for activations."""
    compute = DTYPES[cfg.weight_dtype].itemsize
    tensors = [(group, n) for group, numels in sizes.groups for n in numels]
    bits = cfg.optimizer_spec.fused_bits
    moments = sum(moment_bytes(n, bits) for _, n in tensors)
    offload = cfg.fused.offload_optimizer != "none"
    # Small tensors wait for the last of them, beside the layer at hand.
    small = sum(n for group, n in tensors if group == 32)
    layer = max((sum(numels) for numels in sizes.layers), default=0)
    rows = [
        Row(f"U-Net weights ({cfg.weight_dtype})", sizes.total * compute),
        *teacher_rows(cfg, sizes, compute),
        Row(f"optimizer state ({cfg.optimizer.name})", 0 if offload else moments, moments if offload else 0),
        Row("gradients: the largest layer, and small tensors", (layer + small) * compute, phases=("backward",)),
    ]
    if offload:
        fetched = max(
            (sum(moment_bytes(n, cfg.optimizer_spec.fused_bits) for n in numels) for numels in sizes.layers), default=0
        )
        rows.append(Row("optimizer state of the layer at hand", fetched, phases=("backward",)))
    if cfg.retains:
        rows += _kept(cfg, sizes, compute, [n for _, n in tensors])
    return [row for row in rows if row.device or row.host]


def _kept(cfg: Config, sizes: Sizes, compute: int, numels: list[int]) -> list[Row]:
    surgery, dtype = cfg.surgery, retain_dtype(cfg)
    kept = sum(stored_nbytes(dtype, n, compute) for n in numels)
    host = surgery.retain_device == "host"
    rows = [Row(f"retain gradient ({dtype})", 0 if host else kept, kept if host else 0)]
    largest = max((sum(stored_nbytes(dtype, n, compute) for n in layer) for layer in sizes.layers), default=0)
    if host:
        rows.append(Row("retain gradient of the layer at hand", largest, phases=("backward",)))
    if surgery.retain_ema:
        means = 2 * FP32 * max((sum(layer) for layer in sizes.layers), default=0)
        rows.append(Row("running mean of the layer at hand, old and new", means, phases=("backward",)))
    return rows
