"""Which checkpoint a run continues from, and what it refuses to continue. Comes before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError

from fastunlearn.config import Config
from fastunlearn.errors import UserError
from fastunlearn.methods.tables import build_method, rank_table
from fastunlearn.models.identity import model_digest
from fastunlearn.training.checkpoint_files import check_whole, damage
from fastunlearn.utils.foreign import json_object
from fastunlearn.utils.run_folder import list_checkpoints

STATE = "state.json"
FREE_FIELDS = (
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "checkpoint", "report", "evaluation", "export",
    "train.logging_steps", "train.memory_check", "train.cpu_threads", "surgery.max_skipped_updates",
    "model.cache_dir", "model.local_files_only",
)  # fmt: skip
"""What may differ between a run and its continuation without changing the mathematics."""
MODEL, STEPS = "model.pretrained_model_name_or_path", "train.max_train_steps"
"""Compared by what they mean: the files of the model, and the updates that are left."""
FIELD = "resume_from_checkpoint"


class SavedState(BaseModel):
    """``state.json``: how far the run had come, and which run it was."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    update: NonNegativeInt
    seconds: NonNegativeFloat
    rollout_seconds: NonNegativeFloat
    evaluations: dict[str, NonNegativeInt]
    world_size: PositiveInt
    config: dict[str, Any]
    model: str | None
    """A hash of the files of the model that is edited; None where they could not be read any more."""


def find_checkpoint(cfg: Config, world_size: int, is_main: bool = True) -> Path | None:
    """The checkpoint to continue from, whole and of this run, or None for a fresh run.

    "latest" is the newest that is whole; those that are damaged are named. ``is_main``: whether this rank talks to the
    user and compares the model's files, which can take seconds.

    Raises:
        UserError: there is none, it is damaged, or it belongs to another run.
    """
    asked = cfg.resume_from_checkpoint
    if asked is None:
        return None
    if asked == "latest":
        folder = _latest(cfg, is_main)
    else:
        folder = Path(asked) if Path(asked).is_dir() else Path(cfg.output_dir) / asked
        if not (folder / STATE).is_file():
            raise UserError(f"{FIELD}: {asked} is not a checkpoint folder; try 'latest'")
        check_whole(folder)
    check_resumable(folder, cfg, world_size, is_main)
    return folder


def _latest(cfg: Config, is_main: bool) -> Path:
    found = list_checkpoints(cfg.output_dir)
    if not found:
        raise UserError(f"{FIELD}: no checkpoint in {cfg.output_dir}; start without it")
    for folder in reversed(found):
        reason = damage(folder)
        if reason is None:
            return folder
        if is_main:
            print(f"{folder.name} is damaged: {reason}; looking for an earlier one", file=sys.stderr)
    raise UserError(f"{FIELD}: every checkpoint in {cfg.output_dir} is damaged; start without it")


def read_state(folder: Path) -> SavedState:
    """What ``state.json`` says.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return SavedState.model_validate(json_object(folder / STATE))
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(f"{FIELD}: {folder.name}/{STATE} cannot be read; use another checkpoint") from error


def fingerprint(cfg: Config) -> dict[str, Any]:
    """The fields of a run by their dotted names, without those that change nothing."""
    fields = _dotted(cfg.resolved().model_dump(mode="json"))
    return {name: value for name, value in fields.items() if not _is_free(name)}


def check_resumable(folder: Path, cfg: Config, world_size: int, is_main: bool = True) -> None:
    """Refuse to continue a run that this one is not, and say what becomes of another number of updates.

    Raises:
        UserError: unreadable state, another world size, another model, or a field with another value.
    """
    state = read_state(folder)
    if state.world_size != world_size:
        raise UserError(
            f"{FIELD}: {folder.name} was written by {state.world_size} rank(s) and its optimizer state is split "
            f"accordingly, this run has {world_size}; start it with --num_gpus {state.world_size}"
        )
    new, old = fingerprint(cfg), state.config
    different = [name for name in {**old, **new} if new.get(name) != old.get(name) and name not in (MODEL, STEPS)]
    if different:
        first, more = different[0], len(different) - 1
        others = f" (and {more} more: {', '.join(different[1:4])}{', ...' if more > 3 else ''})" if more else ""
        raise UserError(
            f"{FIELD}: {folder.name} belongs to a run with {first} {_shown(old.get(first))}, this one has "
            f"{_shown(new.get(first))}{others}; use the old value, or start in another output_dir"
        )
    _check_model(folder, cfg, state, is_main)
    _check_steps(folder, cfg, state, world_size, is_main)


def _check_model(folder: Path, cfg: Config, state: SavedState, is_main: bool) -> None:
    """The same files, wherever they lie; by name alone where they cannot be compared."""
    old, new = state.config.get(MODEL), cfg.model.pretrained_model_name_or_path
    digest = model_digest(cfg.model) if is_main and state.model is not None else None
    if digest is not None and digest != state.model:
        raise UserError(f"{FIELD}: {folder.name} belongs to a run of another model; the files of {new!r} differ")
    if is_main and digest is None and old != new:
        raise UserError(f"{FIELD}: {folder.name} belongs to a run of the model {_shown(old)}, this one has {new!r}")


def _check_steps(folder: Path, cfg: Config, state: SavedState, world_size: int, is_main: bool) -> None:
    """More or fewer updates in all, where the updates so far and the learning rate are the same."""
    before, now = state.config.get(STEPS), cfg.max_train_steps
    if before == now:
        return
    if state.update > now:
        raise UserError(
            f"{FIELD}: {folder.name} has made {state.update} updates already, and {STEPS} is {now}; choose at least "
            f"{state.update}, or an earlier checkpoint"
        )
    if cfg.train.lr_scheduler != "constant":
        raise UserError(
            f"{FIELD}: {folder.name} belongs to a run with {STEPS} {before}, this one has {now}, and the learning rate "
            f"of train.lr_scheduler '{cfg.train.lr_scheduler}' follows it; use {before}, or start in another output_dir"
        )
    train = cfg.train.model_copy(update={"max_train_steps": before})
    earlier, made, ended = cfg.model_copy(update={"train": train}), state.update, state.update == now
    if _made(cfg, made, world_size, ended) != _made(earlier, made, world_size, ended):
        raise UserError(
            f"{FIELD}: with {STEPS} {now} instead of {before} the updates so far would have been others; use {before}, "
            "or an earlier checkpoint"
        )
    if is_main:
        print(f"{folder.name}: {state.update} of then {before} updates are made; this run goes on to {now}")


def _made(cfg: Config, updates: int, world_size: int, ended: bool) -> list[Any]:
    """The first updates of the run: key steps, and which prompts are augmented. ``ended``: no update is left that could
    go on with the last trajectory."""
    method, steps = build_method(cfg), rank_table(cfg, 0, world_size)[:updates]
    made: list[Any] = [(step, method.augmentation(step)) for step in steps]
    if made and ended:
        made[-1] = (replace(steps[-1], continues=False), made[-1][1])
    return made


def _dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 1}} -> {"train.seed": 1}; lists stay."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE_FIELDS)


def _shown(value: Any) -> str:
    text = "(nothing)" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
