"""Checks of the disk before anything heavy is loaded: the model folder, the output folder, the space.

What this is: standard library only, reads file headers and writes nothing that stays. On several ranks call it before
any rank writes, since it refuses an output folder that already holds a run.
What this is not: loading. A hub id is only checked for its shape; ``backbone.py`` reports what the hub answers.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastunlearn.config import Config, resolved_scope
from fastunlearn.errors import UserError, nearest

FIELD = "model.pretrained_model_name_or_path"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# What a run writes into output_dir; any of these says that a run was started there.
RUN_FILES = ("config.toml", "unet", "delta.safetensors", "metrics.json", "train_log.jsonl", "samples", "README.md")
KERNELS_VARIABLE, KERNEL_CHOICES = "FASTUNLEARN_KERNELS", ("auto", "reference", "triton")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Rough share of the U-Net's parameters per scope (SDXL; SD 1.4 differs by a few points), to estimate disk space.
SCOPE_SHARES = {"attn2": 0.22, "attn2_kv": 0.14, "noxattn": 0.8, "selfattn": 0.3, "full": 1.0}
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
    folder = check_model(cfg)
    check_output_dir(cfg)
    check_disk_space(cfg, folder)


def check_model(cfg: Config) -> Path | None:
    """Refuse a model that is missing, of another kind, or damaged; return its folder, or None for a hub id.

    Raises:
        UserError: with the path, and the nearest sibling where there is one.
    """
    name = cfg.model.pretrained_model_name_or_path
    if cfg.uses_minicanvas:
        from fastunlearn.minicanvas import pipeline_path

        folder = pipeline_path()
    else:
        folder = Path(name)
    if not folder.exists() and is_hub_id(name):
        return None
    if not folder.is_dir():
        _refuse_path(name, folder)
    components = _pipeline_components(folder)
    for component in components:
        _check_component(folder / component, cfg.model.variant)
    return folder


def is_hub_id(name: str) -> bool:
    """Whether ``name`` reads as "org/name" and not as a path: its first part is no folder here."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name.partition("/")[0]).exists()


def _refuse_path(name: str, folder: Path) -> None:
    if folder.is_file():
        raise UserError(f"{FIELD}: {name!r} is a file; a diffusers folder with model_index.json is needed")
    siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
    known = siblings if "/" in name else ["minicanvas", *siblings]
    raise UserError(
        f'{FIELD}: {name!r} does not exist; allowed are "minicanvas", a diffusers folder or a hub id "org/name"'
        + nearest(folder.name, known)
    )


def _pipeline_components(folder: Path) -> list[str]:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{FIELD}: {str(folder)!r} has no model_index.json; a whole diffusers pipeline is needed")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        name = content["_class_name"]
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{FIELD}: {str(index)!r} is damaged: no JSON with a _class_name") from None
    if name not in PIPELINES:
        raise UserError(f"{FIELD}: {str(folder)!r} is a {name}; allowed are {' and '.join(PIPELINES)}")
    return [component for component in COMPONENTS if content.get(component, [None])[0] is not None]


def _check_component(folder: Path, variant: str | None) -> None:
    if not folder.is_dir():
        raise UserError(f"{FIELD}: {str(folder)!r} is missing, though model_index.json lists it")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{FIELD}: {str(folder)!r} holds no *.safetensors weights; pickled weights are not read")
    variants = {_variant(file) for file in files}
    known = ", ".join(sorted(repr(known) for known in variants if known))
    if variant not in variants:
        if variant is None:
            raise UserError(f"model.variant: none given, but {str(folder)!r} only holds the variant {known}; set it")
        if folder.name == "unet" or None not in variants:  # other parts may lack the variant; diffusers falls back
            raise UserError(f"model.variant: {variant!r} is not in {str(folder)!r}; allowed: {known or 'none'}")
    for file in files:
        if _variant(file) == (variant if variant in variants else None):
            check_safetensors(file)


def _variant(file: Path) -> str | None:
    """``model.fp16.safetensors`` -> "fp16"; ``model.fp16-00001-of-00002.safetensors`` -> "fp16"; else None."""
    parts = re.sub(r"-\d{5}-of-\d{5}", "", file.name).split(".")
    return parts[1] if len(parts) == 3 else None


def check_safetensors(file: Path) -> int:
    """Compare what a safetensors header declares with the size of the file; return its number of elements.

    Raises:
        UserError: the file is truncated, is not safetensors, or declares more or less data than it holds.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise UserError(f"{str(file)!r} is corrupt: no safetensors header in {size} bytes; download it again")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        declared = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        elements = sum(math.prod(entry["shape"]) for entry in header.values())
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read: {error.strerror or error}") from None
    except (struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise UserError(f"{str(file)!r} is corrupt: its safetensors header is unreadable; download it again") from None
    if declared != size:
        raise UserError(f"{str(file)!r} is corrupt: it declares {declared} bytes and has {size}; download it again")
    return elements


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
        found = next(_run_traces(folder), None)
        if found is not None:
            raise UserError(
                f"output_dir: {cfg.output_dir!r} already holds a run ({found.name}); choose another folder, "
                "--resume_from_checkpoint latest, or --overwrite_output_dir"
            )


def check_results(folder: Path) -> None:
    """Refuse a folder in which no run has finished.

    Raises:
        UserError: names what is missing.
    """
    for needed in ("config.toml", "unet/config.json"):
        if not (folder / needed).is_file():
            raise UserError(
                f"--model: {str(folder)!r} has no {needed}; expected the output_dir of a finished `fastunlearn train`"
            )


def checkpoints(folder: Path) -> list[Path]:
    """The ``checkpoint-N`` folders of a run, oldest first."""
    found = [(int(match[1]), entry) for entry in folder.glob("*") if (match := CHECKPOINT.fullmatch(entry.name))]
    return [entry for _, entry in sorted(found) if entry.is_dir()]


def _run_traces(folder: Path) -> Iterator[Path]:
    yield from (folder / name for name in RUN_FILES if (folder / name).exists())
    yield from checkpoints(folder)


def _check_resume(wanted: str, folder: Path) -> None:
    known = [entry.name for entry in checkpoints(folder)]
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


def check_disk_space(cfg: Config, model_folder: Path | None) -> None:
    """Refuse a disk that cannot hold what the run leaves (roughly; unknown for a hub model that is not here yet).

    Raises:
        UserError: with the space that is needed and the space that is free.
    """
    place = _existing_ancestor(Path(cfg.output_dir))
    needed = MARGIN_BYTES if model_folder is None else needed_bytes(cfg, model_folder)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"output_dir: {cfg.output_dir!r} has {free / 2**20:,.0f} MiB free, and the run needs about "
            f"{needed / 2**20:,.0f} MiB; free some space, or choose another disk"
        )


def needed_bytes(cfg: Config, model_folder: Path) -> int:
    """The edited U-Net, the changed tensors in fp32, and as many checkpoints as exist at one time."""
    files = [file for file in (model_folder / "unet").glob("*.safetensors") if _variant(file) == cfg.model.variant]
    trained = SCOPE_SHARES[resolved_scope(cfg)] * sum(check_safetensors(file) for file in files)
    # One more than the limit: a new checkpoint is complete before the oldest is removed.
    kept = cfg.checkpoint.checkpoints_total_limit + 1 if cfg.checkpoint.checkpointing_steps else 0
    unet = sum(file.stat().st_size for file in files)
    return int(MARGIN_BYTES + unet + trained * (4 + STATE_BYTES * kept))
