"""How many U-Net evaluations a run will make, from its key-step table.

The same four counters as ``predictors.Evaluations``, added up per update from the configuration alone. They are exact:
``tests/planning/test_planning.py`` holds them against runs.
"""

from __future__ import annotations

from fastunlearn.config import Config, resolved_steps
from fastunlearn.config.base import first_student_update
from fastunlearn.denoisers.predictors import Evaluations
from fastunlearn.meta.memory import add_meta, pool_sizes
from fastunlearn.methods.base import Method, UNetCalls
from fastunlearn.methods.tables import build_method, rank_table
from fastunlearn.progress.prompts import picture_count
from fastunlearn.progress.stopping import probes_of
from fastunlearn.sampling.key_steps import KeyStep


def count_evaluations(cfg: Config, world: int) -> Evaluations:
    """Single-sample evaluations of the whole run, all ranks together."""
    count = Evaluations(probe=_probes(cfg))
    if not cfg.trains:
        return count
    count.teacher += _pool(cfg) * world
    if cfg.train.spread_concepts:
        for rank in range(world):
            _add_table(cfg, count, rank_table(cfg, rank, world), 1)
    else:
        _add_table(cfg, count, rank_table(cfg, 0, world), world)
    return count


def _probes(cfg: Config) -> int:
    """All probes that there can be, and the pictures that they are compared with. Ranks share the pictures."""
    updates = resolved_steps(cfg) - first_student_update(cfg) if cfg.trains else 1
    looks = len(list(probes_of(updates, cfg.progress.every)))
    return (4 + 2 * looks) * picture_count(cfg) * cfg.progress.num_inference_steps


def _add_table(cfg: Config, count: Evaluations, table: list[KeyStep], ranks: int) -> None:
    """What ``ranks`` ranks evaluate that share a table."""
    method, calls = build_method(cfg), cfg.method_spec.calls(cfg)
    micro_batches = cfg.train.gradient_accumulation_steps * ranks
    batch, retained = cfg.train.train_batch_size * micro_batches, cfg.retain_batch_size * micro_batches
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
            count.teacher += batch * calls.teacher
            count.rollout += batch * _left_for_sampler(calls, method, step)
        student = batch * calls.trained
        if trains:
            count.student_forward += student + batch * calls.own_target
            count.student_backward += student
        else:
            count.rollout += student


def _add_targets(cfg: Config, count: Evaluations, table: list[KeyStep], ranks: int) -> None:
    """The original's trajectories, which every rank walks: ``sampling.cached_sampler.sample_targets``."""
    trajectories = cfg.teacher.trajectories * ranks
    for concept in {step.concept for step in table}:
        wanted = {step.index for step in table if step.concept == concept}
        count.teacher += 3 * trajectories * len(wanted)
        count.rollout += 2 * trajectories * (max(wanted) + 1 - len(wanted))


def _left_for_sampler(calls: UNetCalls, method: Method, step: KeyStep) -> int:
    """Predictions that the trajectory needs and training did not make: see ``methods.base.guided_prediction``."""
    if not step.continues:
        return 0
    return (calls.trained == 1) + (method.augmentation(step) is not None)


def _pool(cfg: Config) -> int:
    """Every rank draws the whole pool of pictures for itself, guided."""
    retain = cfg.retain
    pictures = pools(cfg) * retain.num_images + pool_sizes(cfg)[0]
    return 2 * pictures * retain.num_inference_steps


def pools(cfg: Config) -> int:
    """How many pools of pictures are drawn: of anchors to train on, and for a retain set that does not share them."""
    source = cfg.retain_source if cfg.retains else None
    anchors = cfg.method_spec.samples == "anchors"
    return anchors + (source == "generated" or (source == "anchors" and not anchors))


def _add_retain(cfg: Config, count: Evaluations, step: KeyStep, rows: int) -> None:
    count.student_forward += rows
    count.student_backward += rows
    if cfg.retain.target == "teacher":
        count.teacher += rows
    if cfg.retain_source == "prompts":  # trajectories of their own
        count.rollout += 2 * rows * (step.index if step.restart else 0) + (2 * rows if step.continues else 0)
