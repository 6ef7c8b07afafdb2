"""Resumable checkpoints: optimizer, trained weights, key-step position, and whatever else carries state.

What is in ``checkpoint-N/``, written and read by all ranks together. Its life as files is in ``checkpoint_files.py``,
what a run continues from in ``resuming.py``. The exported model is written in ``export/formats/``.

    checkpoint-N/state.json        position, world size, configuration, model, evaluation counts
    checkpoint-N/parts-rank-R.pt   what rank R's trajectories, method, surgery and retain source carry on, if anything
    checkpoint-N/deepspeed/        DeepSpeed's shards; the fused engine has fused.pt instead
    checkpoint-N/manifest.json     size and SHA-256 of each of them
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from fastunlearn.config import Config
from fastunlearn.errors import UserError
from fastunlearn.models.identity import model_digest
from fastunlearn.training.checkpoint_files import drop_older, finish, new_folder, records
from fastunlearn.training.resuming import FIELD, STATE, SavedState, fingerprint, read_state
from fastunlearn.utils.distributed import World, all_or_none, gather_from_ranks
from fastunlearn.utils.files import atomic_write_text, remove, save_tensors, sibling, write_errors
from fastunlearn.utils.text import first_line


@dataclass
class Position:
    """How far a run has come."""

    update: int
    seconds: float
    rollout_seconds: float
    evaluations: dict[str, int]


class Stateful(Protocol):
    """Something that carries state from one update to the next."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class Saved(Protocol):
    """An engine, as far as a checkpoint is concerned."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def save_checkpoint(
    cfg: Config,
    world: World,
    engine: Saved,
    parts: Mapping[str, Stateful],
    position: Position,
    limit: int | None = None,
) -> Path | None:
    """Write ``checkpoint-<update>`` and drop the oldest beyond the limit, by default the configured one. Collective.

    Where a rank cannot write its part (a full disk, a quota, a read-only folder), a line says so, the earlier
    checkpoints stay, and the answer is None: the run goes on, and may try again later.
    """
    final = Path(cfg.output_dir) / f"checkpoint-{position.update}"
    partial = sibling(final, "partial")
    try:
        with all_or_none(), write_errors(final):
            if world.is_main:
                new_folder(final)
        with all_or_none(), write_errors(final):
            engine.save(partial)
            _save_parts(partial, world, parts)
            if world.is_main:
                atomic_write_text(partial / STATE, _state(cfg, world, position).model_dump_json(indent=1))
        with all_or_none(), write_errors(final):
            share = records(partial, world.rank, world.world_size)
        shares = gather_from_ranks(share)
        with all_or_none(), write_errors(final):
            if world.is_main:
                finish(partial, final, {name: record for part in shares for name, record in part.items()})
                drop_older(final, limit or cfg.checkpoint.checkpoints_total_limit)
    except UserError as error:
        if world.is_main:
            remove(partial)
            print(f"warning: {final.name} is not saved, the run goes on: {error}", file=sys.stderr)
        return None
    return final


def load_checkpoint(folder: Path, world: World, engine: Saved, parts: Mapping[str, Stateful]) -> Position:
    """Restore engine and parts, and return where the run stands. Collective.

    Raises:
        UserError: the files do not hold the state of such a run.
    """
    state = read_state(folder)
    try:
        engine.load(folder)
        _load_parts(folder, world, parts)
    except UserError:
        raise
    except Exception as error:  # whatever a file that is not ours provokes
        raise UserError(
            f"{FIELD}: {folder.name} does not hold the state of this run ({first_line(error)[:120]}); use another one"
        ) from error
    return Position(state.update, state.seconds, state.rollout_seconds, state.evaluations)


def _state(cfg: Config, world: World, position: Position) -> SavedState:
    return SavedState(
        **asdict(position), world_size=world.world_size, config=fingerprint(cfg), model=model_digest(cfg.model)
    )


def _parts_file(folder: Path, world: World) -> Path:
    return folder / f"parts-rank-{world.rank}.pt"


def _save_parts(folder: Path, world: World, parts: Mapping[str, Stateful]) -> None:
    states = {name: state for name, part in parts.items() if (state := part.state_dict())}
    if states:
        save_tensors(states, _parts_file(folder, world))


def _load_parts(folder: Path, world: World, parts: Mapping[str, Stateful]) -> None:
    file = _parts_file(folder, world)
    states = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else {}
    for name, part_state in states.items():
        parts[name].load_state_dict(part_state)
