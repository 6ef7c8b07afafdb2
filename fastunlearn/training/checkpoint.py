"""Resumable checkpoints: optimizer, trained weights, key-step position, and whatever else carries state.

The layout of ``checkpoint-N/``, how it becomes whole, which ones are kept, and what a resume refuses. The exported
model is written in ``export/formats/``.

    checkpoint-N/state.json        position, world size, configuration fingerprint, evaluation counts
    checkpoint-N/parts-rank-R.pt   what rank R's trajectories, method, surgery and retain source carry on, if anything
    checkpoint-N/deepspeed/        DeepSpeed's shards

A checkpoint is written beside its final name and renamed once every rank is done: one that has its name is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from fastunlearn.config import Config
from fastunlearn.errors import UserError
from fastunlearn.utils.distributed import World, barrier
from fastunlearn.utils.run_folder import list_checkpoints

# What may differ between a run and its continuation without changing the weights that come out.
FREE_FIELDS = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "checkpoint",
    "report",
    "evaluation",
    "export",
)


@dataclass
class Position:
    """How far a run has come."""

    update: int
    seconds: float
    rollout_seconds: float
    evaluations: dict[str, int]


def find_checkpoint(cfg: Config) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run.

    Raises:
        UserError: "latest" with none there, or a folder that is not a checkpoint.
    """
    if cfg.resume_from_checkpoint is None:
        return None
    if cfg.resume_from_checkpoint == "latest":
        found = list_checkpoints(cfg.output_dir)
        if not found:
            raise UserError(f"resume_from_checkpoint: no checkpoint in {cfg.output_dir}; start without it")
        return found[-1]
    path = Path(cfg.resume_from_checkpoint)
    path = path if path.is_dir() else Path(cfg.output_dir) / path
    if not (path / "state.json").is_file():
        raise UserError(
            f"resume_from_checkpoint: {cfg.resume_from_checkpoint} is not a checkpoint folder; try 'latest'"
        )
    return path


def fingerprint(cfg: Config) -> dict:
    """The fields that decide the result of a run."""
    data = cfg.resolved().model_dump(mode="json")
    return {name: value for name, value in data.items() if name not in FREE_FIELDS}


def check_resumable(folder: Path, cfg: Config, world_size: int) -> None:
    """Refuse to continue a run that this one is not. Reads only ``state.json``, so it comes before anything is loaded.

    Raises:
        UserError: unreadable state, another world size, or another configuration.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        saved, old = state["world_size"], state["config"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"resume_from_checkpoint: {folder}/state.json cannot be read; use another checkpoint"
        ) from error
    if saved != world_size:
        raise UserError(
            f"resume_from_checkpoint: {folder.name} was written by {saved} rank(s) and its optimizer state is split "
            f"accordingly, this run has {world_size}; start it with --num_gpus {saved}"
        )
    new = fingerprint(cfg)
    different = [name for name in new if new[name] != old.get(name)]
    if different:
        raise UserError(
            f"resume_from_checkpoint: {folder.name} belongs to a run with another '{different[0]}'; "
            "resume with the same configuration, or start in another output_dir"
        )


class Stateful(Protocol):
    """Something that carries state from one update to the next."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class Saved(Protocol):
    """An engine, as far as a checkpoint is concerned."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def save_checkpoint(
    cfg: Config, world: World, engine: Saved, parts: Mapping[str, Stateful], position: Position
) -> Path:
    """Write ``checkpoint-<update>`` and drop the oldest beyond the limit. Collective."""
    final = Path(cfg.output_dir) / f"checkpoint-{position.update}"
    partial = final.with_name(f"{final.name}.partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    engine.save(partial)
    states = {name: state for name, part in parts.items() if (state := part.state_dict())}
    if states:
        torch.save(states, partial / f"parts-rank-{world.rank}.pt")
    barrier()
    if world.is_main:
        payload = asdict(position) | {"world_size": world.world_size, "config": fingerprint(cfg)}
        (partial / "state.json").write_text(json.dumps(payload, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in list_checkpoints(cfg.output_dir)[: -cfg.checkpoint.checkpoints_total_limit]:
            shutil.rmtree(old)
    barrier()
    return final


def load_checkpoint(folder: Path, world: World, engine: Saved, parts: Mapping[str, Stateful]) -> Position:
    """Restore engine and parts, and return where the run stands. Collective."""
    engine.load(folder)
    saved_parts = folder / f"parts-rank-{world.rank}.pt"
    states = torch.load(saved_parts, map_location="cpu", weights_only=True) if saved_parts.exists() else {}
    for name, part_state in states.items():
        parts[name].load_state_dict(part_state)
    state = json.loads((folder / "state.json").read_text())
    return Position(state["update"], state["seconds"], state["rollout_seconds"], state["evaluations"])
