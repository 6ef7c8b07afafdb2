"""What a meta term holds, and what it evaluates.

The attack comes first in an update, when no gradient of the engine is alive; the losses behind it make one while the
weights before the attack are kept. Follows ``inner_loop.py`` and ``objective.py``.
"""

from __future__ import annotations

from fastunlearn.config import Config
from fastunlearn.config.run_prompts import meta_prompts
from fastunlearn.denoisers.predictors import Evaluations
from fastunlearn.engines.fused.moments import moment_bytes
from fastunlearn.gradients.buffer import stored_nbytes
from fastunlearn.schema.meta import SETS, meta_weights, set_weights
from fastunlearn.utils.dtypes import DTYPES
from fastunlearn.utils.memory_rows import AFTER_META, PHASES, Row, Sizes


def attack_rows(cfg: Config, sizes: Sizes) -> list[Row]:
    """What is there besides the method's own."""
    if not cfg.has_meta:
        return []
    compute = DTYPES[cfg.weight_dtype].itemsize
    attacked = (*sizes.trained, *sizes.frozen) if cfg.meta.inner_scope == "full" else sizes.trained
    total = sum(attacked)
    stored = sum(stored_nbytes(cfg.meta.gradient_dtype, n, compute) for n in sizes.trained)
    before = total * compute
    rows = [
        Row("meta: weights before the attack", before, phases=("attack", "backward", "reduce"), windows=("meta",)),
        Row("meta: the attacker's gradient", total * compute, phases=("attack",)),
        Row("meta: gradient that waits", stored, phases=("backward", "reduce", "keep", "project"), windows=AFTER_META),
    ]
    state = moments(cfg, attacked)
    if cfg.meta.steps_per_attack == 1:
        return [*rows, Row("meta: the attacker's moments", state, phases=("attack",))]
    # Between two terms the attacker's distance takes the place of the weights before the attack.
    distance = Row("meta: how far it came", before, phases=PHASES, windows=AFTER_META)
    return [*rows, Row("meta: the attacker's moments", state), distance]


def moments(cfg: Config, numels: tuple[int, ...]) -> int:
    """Of the simulated attacker's optimizer."""
    if cfg.meta.inner_optimizer == "sgd":
        return 0
    return sum(moment_bytes(n, 8 if cfg.bf16_weights else 32) for n in numels)


def pool_sizes(cfg: Config) -> tuple[int, int]:
    """(pictures in all sets, sets that are drawn by the model)"""
    if not cfg.has_meta:
        return 0, 0
    drawn = len(meta_prompts(cfg))
    return drawn * cfg.meta.num_images, drawn


def add_meta(cfg: Config, count: Evaluations, ranks: int) -> None:
    """What one meta term evaluates on ``ranks`` ranks."""
    meta, weights = cfg.meta, meta_weights(cfg.meta)
    batch = meta.batch_size * ranks
    sets = sum(1 for name in SETS if set_weights(meta)[name])
    kept = sets - bool(weights.after_forbidden) if weights.before_related or weights.before_unrelated else 0
    recorded = meta.inner_steps * meta.inner_batch_size * ranks + (sets + kept) * batch
    count.student_forward += recorded
    count.student_backward += recorded
    if not meta.ascends:
        count.teacher += sets * batch * (2 if meta.negative_guidance else 1)
