"""How many U-Net evaluations a run will make, from its key-step table.

What this is: the same four counters as ``predictors.Evaluations``, added up per update from the configuration alone. It
is exact, and ``tests/planning/test_planning.py`` holds it against runs.
What this is not: seconds.
"""

from __future__ import annotations

from fastunlearn.config import Config, first_student_update
from fastunlearn.denoisers.predictors import Evaluations
from fastunlearn.methods import KSCU, build_method, rank_table
from fastunlearn.methods.base import Method
from fastunlearn.planning.meta_rows import add_meta, pool_sizes
from fastunlearn.sampling.key_steps import KeyStep


def count_evaluations(cfg: Config, world: int) -> Evaluations:
    """Single-sample evaluations of the whole run, all ranks together."""
    if not cfg.trains:
        return Evaluations()
    count = Evaluations(teacher=_pool(cfg, build_method(cfg)) * world)
    if cfg.train.spread_concepts:
        for rank in range(world):
            _add_table(cfg, count, rank_table(cfg, rank, world), 1)
    else:
        _add_table(cfg, count, rank_table(cfg, 0, world), world)
    return count


def _add_table(cfg: Config, count: Evaluations, table: list[KeyStep], ranks: int) -> None:
    """What ``ranks`` ranks evaluate that share a table."""
    method = build_method(cfg)
    micro_batches = cfg.train.gradient_accumulation_steps * ranks
    batch, retained = cfg.train.train_batch_size * micro_batches, cfg.retain.batch_size * micro_batches
    cached = cfg.teacher.storage == "cached"
    if cached:
        _add_targets(cfg, count, table, ranks)
    for step in table:
        trains = step.update >= first_student_update(cfg)
        if cfg.has_meta and trains and step.update % cfg.meta.every == 0:
            add_meta(cfg, count, ranks)
        if cfg.retains and trains:
            _add_retain(cfg, count, step, retained)
        if cfg.closed_form:
            continue
        if not cached:
            count.rollout += 2 * batch * step.index if step.restart else 0
            count.teacher += batch * teacher_conditions(cfg, method)
            count.rollout += batch * _left_for_sampler(method, step)
        student = batch * trained_conditions(method)
        if trains:
            count.student_forward += student + batch * own_targets(cfg)
            count.student_backward += student
        else:
            count.rollout += student


def _add_targets(cfg: Config, count: Evaluations, table: list[KeyStep], ranks: int) -> None:
    """The original's trajectories, which every rank walks: ``cached_windows.sample_targets``."""
    trajectories = cfg.teacher.trajectories * ranks
    for concept in {step.concept for step in table}:
        wanted = {step.index for step in table if step.concept == concept}
        count.teacher += 3 * trajectories * len(wanted)
        count.rollout += 2 * trajectories * (max(wanted) + 1 - len(wanted))


def teacher_conditions(cfg: Config, method: Method) -> int:
    """Conditions per sample of the frozen model's call in an unlearning window."""
    if isinstance(method, KSCU):
        return 3 if method.trains_uncond else 2
    if cfg.method == "sdd":
        return 0
    if cfg.method == "doco":
        return 1 if cfg.doco.guidance_scale == 1.0 else 2
    return 2


def trained_conditions(method: Method) -> int:
    """Conditions per sample of the student's recorded call in an unlearning window."""
    return 2 if isinstance(method, KSCU) and method.trains_uncond else 1


def own_targets(cfg: Config) -> int:
    """Conditions per sample of the student's call without a gradient, where it is its own target."""
    return 1 if cfg.method == "sdd" else 0


def _left_for_sampler(method: Method, step: KeyStep) -> int:
    """Predictions that the trajectory needs and training did not make: see ``methods.base.sampler_pair``."""
    if not step.continues:
        return 0
    return (trained_conditions(method) == 1) + (method.augmentation(step) is not None)


def _pool(cfg: Config, method: Method) -> int:
    """Every rank draws the whole pool of pictures for itself, guided."""
    retain = cfg.retain
    pictures = pools(cfg, method) * retain.num_images + pool_sizes(cfg)[0]
    return 2 * pictures * retain.num_inference_steps


def pools(cfg: Config, method: Method) -> int:
    """How many pools of pictures are drawn: for DoCo's windows, and for a retain set that does not share them."""
    source = cfg.retain_source if cfg.retains else None
    return (not method.trajectories) + (source == "generated" or (source == "anchors" and method.trajectories))


def _add_retain(cfg: Config, count: Evaluations, step: KeyStep, rows: int) -> None:
    count.student_forward += rows
    count.student_backward += rows
    if cfg.retain.target == "teacher":
        count.teacher += rows
    if cfg.retain_source == "prompts":  # trajectories of their own
        count.rollout += 2 * rows * (step.index if step.restart else 0) + (2 * rows if step.continues else 0)
