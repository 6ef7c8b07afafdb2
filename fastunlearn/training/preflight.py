"""Checks before anything heavy is loaded: the kernels' choice, model, output folder, the space on the disk.

Reads file headers and writes nothing that stays. The model itself is checked in ``models/checks.py``, the output folder
in ``output_folder.py``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import get_args

from fastunlearn.config import Config, resolved_scope
from fastunlearn.config.run_prompts import folder_captions, set_captions
from fastunlearn.errors import UserError, nearest
from fastunlearn.models.checks import check_model
from fastunlearn.models.formats.configurations import read_config
from fastunlearn.models.formats.folders import weight_files
from fastunlearn.models.formats.headers import read_header
from fastunlearn.models.formats.single_file import read_single_file
from fastunlearn.models.parameter_names import count_trained
from fastunlearn.registry import FORMATS
from fastunlearn.sampling.pictures import check_pictures
from fastunlearn.schema.fields import KernelBackend
from fastunlearn.training.output_folder import check_output_dir, existing_ancestor

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


def check_all(cfg: Config, output: bool = True) -> None:
    """Model, output folder and disk space, in this order.

    ``output``: whether the folder is looked at; on several ranks by the first one, which may be writing there already.

    Raises:
        UserError: the first problem.
    """
    model = check_model(cfg)
    check_users_pictures(cfg)
    if output:
        check_output_dir(cfg)
        check_disk_space(cfg, model)


def check_users_pictures(cfg: Config) -> None:
    """Read every picture that the user brings.

    Raises:
        UserError: names the first that cannot be read, or a caption that is missing.
    """
    if cfg.retains and cfg.retain_source == "folder":
        check_pictures(folder_captions(cfg), "retain.folder")
    if cfg.has_meta:
        for field, pairs in set_captions(cfg).items():
            check_pictures(pairs, field)


def check_disk_space(cfg: Config, model: Path | None) -> None:
    """Refuse a disk that cannot hold what the run leaves (roughly; unknown for a hub model that is not here yet).

    Raises:
        UserError: with the space that is needed and the space that is free.
    """
    place = existing_ancestor(Path(cfg.output_dir))
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
        files = weight_files(place / "unet", cfg.model.variant)
        shapes = {name: entry.shape for file in files for name, entry in read_header(file)[0].items()}
        trained = count_trained(shapes, scope, read_config(place / "unet" / "config.json"))
        unet = sum(file.stat().st_size for file in files)
    # One more than the limit: a new checkpoint is complete before the oldest is removed.
    kept = cfg.checkpoint.checkpoints_total_limit + 1 if cfg.checkpoint.checkpointing_steps else 0
    exported = sum(FORMATS[name].disk_bytes(unet, trained) for name in cfg.export.formats)
    return MARGIN_BYTES + exported + trained * STATE_BYTES * kept
