"""Checks before anything heavy is loaded: the kernels' choice, the output folder, the space on the disk.

Reads file headers and writes nothing that stays. On several ranks call it before any rank writes, since it refuses an
output folder that already holds a run. The model itself is checked in ``models/checks.py``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import get_args

from fastunlearn.config import Config, resolved_scope
from fastunlearn.errors import UserError, nearest
from fastunlearn.export.traces import run_traces
from fastunlearn.models.checks import check_model
from fastunlearn.models.formats.headers import read_header, read_json, unet_files
from fastunlearn.models.formats.single_file import read_single_file
from fastunlearn.models.parameter_names import count_trained
from fastunlearn.registry import FORMATS
from fastunlearn.schema.fields import KernelBackend
from fastunlearn.utils.run_folder import list_checkpoints

KERNELS_VARIABLE, KERNEL_CHOICES = "FASTUNLEARN_KERNELS", get_args(KernelBackend)
STATE_BYTES = 12  # a checkpoint holds an fp32 master weight and two fp32 moments per trained parameter
MARGIN_BYTES = 32 * 2**20  # log, curves and pictures


def check_kernels(has_gpu: bool) -> None:
    """The choice in FASTUNLEARN_KERNELS, which would otherwise be looked at in the middle of the first update.

    Raises:
        UserError: an unknown choice, or Triton where it cannot run.
    """
    asked = os.environ.get(KERNELS_VARIABLE, "auto")
    if asked not in KERNEL_CHOICES:
        raise UserError(
            f"{KERNELS_VARIABLE}: {asked!r} is unknown; allowed are {', '.join(KERNEL_CHOICES)}"
            + nearest(asked, KERNEL_CHOICES)
        )
    if asked == "triton" and not has_gpu and os.environ.get("TRITON_INTERPRET", "0") == "0":
        raise UserError(f"{KERNELS_VARIABLE}: 'triton' needs a GPU and none was found; use 'auto' or 'reference'")


def check_all(cfg: Config) -> None:
    """Model, output folder and disk space, in this order.

    Raises:
        UserError: the first problem.
    """
    model = check_model(cfg)
    check_output_dir(cfg)
    check_disk_space(cfg, model)


def check_output_dir(cfg: Config) -> None:
    """Refuse an output folder that cannot be written, holds a run that would be lost, or lacks the asked checkpoint.

    Raises:
        UserError: nothing has been written.
    """
    folder = Path(cfg.output_dir)
    existing = _existing_ancestor(folder)
    if not existing.is_dir():
        raise UserError(f"output_dir: {cfg.output_dir!r}: {str(existing)!r} is a file; give a folder")
    _check_writable(existing, cfg.output_dir)
    if cfg.resume_from_checkpoint is not None:
        _check_resume(cfg.resume_from_checkpoint, folder)
    elif not cfg.overwrite_output_dir:
        found = next(run_traces(folder), None)
        if found is not None:
            raise UserError(
                f"output_dir: {cfg.output_dir!r} already holds a run ({found.name}); choose another folder, "
                "--resume_from_checkpoint latest, or --overwrite_output_dir"
            )


def _check_resume(wanted: str, folder: Path) -> None:
    known = [entry.name for entry in list_checkpoints(folder)]
    listing = f"; known: {', '.join(known)}" if known else ""
    if wanted == "latest":
        if not known:
            raise UserError(
                f"resume_from_checkpoint: 'latest', but {str(folder)!r} has no checkpoint; "
                "leave it out to start, and set --checkpointing_steps to get some"
            )
    elif not Path(wanted).is_dir() and not (folder / wanted).is_dir():
        hint = nearest(Path(wanted).name, [*known, "latest"])
        raise UserError(f"resume_from_checkpoint: {wanted!r} is not a folder{listing}{hint}")


def _existing_ancestor(folder: Path) -> Path:
    """The folder itself, or the nearest parent that exists (a file in the way counts)."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))


def _check_writable(folder: Path, named: str) -> None:
    try:
        # A permission bit does not tell of a read-only or full file system; an unnamed file does, and leaves nothing.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise UserError(f"output_dir: {named!r} cannot be written: {error.strerror or error}") from None


def check_disk_space(cfg: Config, model: Path | None) -> None:
    """Refuse a disk that cannot hold what the run leaves (roughly; unknown for a hub model that is not here yet).

    Raises:
        UserError: with the space that is needed and the space that is free.
    """
    place = _existing_ancestor(Path(cfg.output_dir))
    needed = MARGIN_BYTES if model is None else needed_bytes(cfg, model)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"output_dir: {cfg.output_dir!r} has {free / 2**20:,.0f} MiB free, and the run needs about "
            f"{needed / 2**20:,.0f} MiB; free some space, or choose another disk"
        )


def needed_bytes(cfg: Config, place: Path) -> int:
    """What each export format takes, and as many checkpoints as exist at one time."""
    scope = resolved_scope(cfg)
    if place.is_file():
        file = read_single_file(place)
        trained, unet = count_trained(file.unet_shapes, scope, file.unet_config), file.unet_bytes
    else:
        files = unet_files(place, cfg.model.variant)
        shapes = {name: entry.shape for file in files for name, entry in read_header(file)[0].items()}
        trained = count_trained(shapes, scope, read_json(place / "unet" / "config.json"))
        unet = sum(file.stat().st_size for file in files)
    # One more than the limit: a new checkpoint is complete before the oldest is removed.
    kept = cfg.checkpoint.checkpoints_total_limit + 1 if cfg.checkpoint.checkpointing_steps else 0
    exported = sum(FORMATS[name].disk_bytes(unet, trained) for name in cfg.export.formats)
    return MARGIN_BYTES + exported + trained * STATE_BYTES * kept
