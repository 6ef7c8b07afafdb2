"""How many bytes the fused engine holds: weights, teacher, moments, the kept gradient, and one layer of gradients.

What this is: arithmetic on the sizes of the U-Net's tensors, following ``fused.py``, ``teacher.py`` and
``kept_gradient.py``. What this is not: activations, or the ZeRO engine (``states.py``).
"""

from __future__ import annotations

from fastunlearn.config import Config
from fastunlearn.planning.states import BLOCK, FP32, Row, Sizes, teacher_bytes


def blocks(numel: int) -> int:
    """Groups of 256 elements that share a scale."""
    return -(-numel // BLOCK)


def moment_bytes(cfg: Config, bits: int, numel: int) -> int:
    """Both of AdamW's moments of one tensor."""
    if cfg.optimizer.name == "adamw" or bits == 32:
        return 2 * FP32 * numel
    return 2 * numel + 2 * FP32 * blocks(numel)


def kept_bytes(cfg: Config, compute: int, numel: int) -> int:
    """The retain gradient of one tensor."""
    surgery = cfg.surgery
    if surgery.retain_dtype in ("auto", "int8"):
        return blocks(numel) * (BLOCK + FP32)
    return numel * {"fp32": FP32, "bf16": 2}.get(surgery.retain_dtype, compute)


def fused_rows(cfg: Config, sizes: Sizes) -> list[Row]:
    """The table but for activations."""
    compute = 2 if cfg.bf16_weights else FP32
    tensors = [(bits, n) for bits, numels in sizes.groups for n in numels]
    moments = sum(moment_bytes(cfg, bits, n) for bits, n in tensors)
    offload = cfg.fused.offload_optimizer == "cpu"
    # Small tensors wait for the last of them, beside the layer at hand.
    small = sum(n for bits, n in tensors if bits == 32)
    layer = max((sum(numels) for numels in sizes.layers), default=0)
    rows = [
        Row(f"U-Net weights ({'bf16' if compute == 2 else 'fp32'})", sizes.total * compute),
        *teacher_bytes(cfg, sizes, compute),
        Row(f"optimizer state ({cfg.optimizer.name})", 0 if offload else moments, moments if offload else 0),
        Row("gradients: the largest layer, and small tensors", (layer + small) * compute, phases=("backward",)),
    ]
    if offload:
        fetched = max((sum(moment_bytes(cfg, 8, n) for n in numels) for numels in sizes.layers), default=0)
        rows.append(Row("optimizer state of the layer at hand", fetched, phases=("backward",)))
    if cfg.retains:
        rows += _kept(cfg, sizes, compute, [n for _, n in tensors])
    return [row for row in rows if row.device or row.host]


def _kept(cfg: Config, sizes: Sizes, compute: int, numels: list[int]) -> list[Row]:
    surgery = cfg.surgery
    kept = sum(kept_bytes(cfg, compute, n) for n in numels)
    host = surgery.retain_device == "host"
    rows = [Row("retain gradient (int8)" if surgery.retain_dtype in ("auto", "int8") else
                f"retain gradient ({surgery.retain_dtype})", 0 if host else kept, kept if host else 0)]  # fmt: skip
    largest = max((sum(kept_bytes(cfg, compute, n) for n in layer) for layer in sizes.layers), default=0)
    if host:
        rows.append(Row("retain gradient of the layer at hand", largest, phases=("backward",)))
    if surgery.retain_ema:
        means = 2 * FP32 * max((sum(layer) for layer in sizes.layers), default=0)
        rows.append(Row("running mean of the layer at hand, old and new", means, phases=("backward",)))
    return rows
