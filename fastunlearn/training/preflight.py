"""Checks of the disk before anything heavy is loaded: the model folder, the output folder, the space.

What this is: standard library only, reads file headers and writes nothing that stays. On several ranks call it before
any rank writes, since it refuses an output folder that already holds a run.
What this is not: loading. Of a hub id only what the hub's cache holds is checked; ``loading.py`` reports what the hub
answers. The files of models are read in ``model_files.py`` and ``single_file.py``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastunlearn.config import Config, ModelConfig, resolved_scope
from fastunlearn.errors import UserError, nearest
from fastunlearn.models.formats.architectures import ARCHITECTURES
from fastunlearn.models.formats.headers import (
    FIELD,
    check_folder,
    check_kind,
    check_safetensors,
    is_hub_id,
    read_header,
    read_json,
    unet_files,
    vae_folder,
)
from fastunlearn.models.formats.single_file import is_vae, read_single_file
from fastunlearn.utils.run_folder import list_checkpoints, run_traces

KERNELS_VARIABLE, KERNEL_CHOICES = "FASTUNLEARN_KERNELS", ("auto", "reference", "triton")
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
    model = check_model(cfg)
    check_output_dir(cfg)
    check_disk_space(cfg, model)


def check_model(cfg: Config) -> Path | None:
    """Refuse a model that is missing, of another kind, or damaged; return its folder or file, or None for a hub id.

    Raises:
        UserError: with the path, and the nearest sibling where there is one.
    """
    name = cfg.model.pretrained_model_name_or_path
    if cfg.uses_minicanvas:
        from fastunlearn.minicanvas import pipeline_path

        place = pipeline_path()
    else:
        place = Path(name)
    if not place.exists() and is_hub_id(name):
        check_hub_cache(cfg.model)
        check_noise(cfg.model, {})
        return None
    if place.is_file():
        _check_file(place, cfg)
    elif place.is_dir():
        check_folder(place, cfg.model.variant)
        check_noise(cfg.model, read_json(place / "scheduler" / "scheduler_config.json"))
        check_vae(cfg.model, read_json(place / "vae" / "config.json"))
    else:
        _refuse_path(name, place)
    return place


def _check_file(file: Path, cfg: Config) -> None:
    found = read_single_file(file)
    architecture = found.architecture(cfg.model)
    if cfg.model.variant is not None:
        raise UserError(f"model.variant: {cfg.model.variant!r} is for folders and hub ids; {str(file)!r} is one file")
    if cfg.model.vae is None and not found.has_vae:
        raise UserError(f"{FIELD}: {str(file)!r} holds no VAE; give one in model.vae")
    check_noise(cfg.model, architecture.scheduler)
    check_vae(cfg.model, architecture.vae)


def check_noise(model: ModelConfig, scheduler: Mapping[str, Any]) -> None:
    """Refuse a model that predicts the noise on a schedule that ends in nothing else.

    Raises:
        UserError: the two do not go together.
    """
    zero_snr, prediction = model.rescale_betas_zero_snr, model.prediction_type
    ends_in_noise = scheduler.get("rescale_betas_zero_snr", False) if zero_snr == "auto" else zero_snr
    predicts = scheduler.get("prediction_type", "v_prediction") if prediction == "auto" else prediction
    if ends_in_noise and predicts == "epsilon":
        raise UserError(
            "model.rescale_betas_zero_snr: true needs model.prediction_type 'v_prediction': at the last step of such a "
            "schedule there is nothing but noise, and predicting it says nothing; this model predicts 'epsilon'"
        )


def check_vae(model: ModelConfig, usual: Mapping[str, Any]) -> None:
    """Refuse another VAE that is missing, damaged, none, or made for other latents than the model's.

    ``usual``: the configuration of the model's own VAE.

    Raises:
        UserError: names the file or folder.
    """
    if model.vae is None:
        return
    place = Path(model.vae)
    if place.is_dir():
        folder = vae_folder(place)
        config = read_json(folder / "config.json")
        if config.get("_class_name") != "AutoencoderKL":
            found = f"holds a {config['_class_name']}" if "_class_name" in config else "has no VAE's config.json"
            raise UserError(f"model.vae: {model.vae!r} {found}; a folder with an AutoencoderKL is needed")
        for field, default in (("latent_channels", 4), ("scaling_factor", 0.18215)):
            ours, theirs = usual.get(field, default), config.get(field, default)
            if usual and ours != theirs:
                raise UserError(
                    f"model.vae: {model.vae!r} has {field} {theirs}, and the model's own VAE {ours}; it is made for "
                    "another model"
                )
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"model.vae: {str(folder)!r} holds no *.safetensors weights; pickled weights are not read")
        for file in files:
            check_safetensors(file)
    elif not place.is_file():
        siblings = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UserError(
            f"model.vae: {model.vae!r} does not exist; a folder or a .safetensors file is needed"
            + nearest(place.name, siblings)
        )
    elif place.suffix.lower() != ".safetensors" or not is_vae(read_header(place)[0]):
        raise UserError(f"model.vae: {model.vae!r} is no VAE in a .safetensors file")


def check_hub_cache(model: ModelConfig) -> None:
    """Refuse a hub model of another kind as far as the hub's cache knows it, and one that is not there when offline.

    Raises:
        UserError: with the kind by name, or the remedy.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    name = model.pretrained_model_name_or_path
    options = {"cache_dir": model.cache_dir, "revision": model.revision}
    index = try_to_load_from_cache(name, "model_index.json", **options)
    if isinstance(index, str):
        check_kind(Path(index).parent, name)
    elif model.local_files_only or constants.HF_HUB_OFFLINE:
        why = "model.local_files_only is set" if model.local_files_only else "HF_HUB_OFFLINE is set"
        at = f" at revision {model.revision!r}" if model.revision else ""
        raise UserError(
            f"{FIELD}: {name!r}{at} is not in {model.cache_dir or constants.HF_HUB_CACHE}, and {why}; "
            "download it first, or give a folder or a file"
        )


def _refuse_path(name: str, folder: Path) -> None:
    siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
    known = siblings if "/" in name else ["minicanvas", *siblings]
    raise UserError(
        f'{FIELD}: {name!r} does not exist; allowed are "minicanvas", a diffusers folder, a .safetensors file or a hub '
        'id "org/name"' + nearest(folder.name, known)
    )


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
    """The edited U-Net, the changed tensors in fp32, and as many checkpoints as exist at one time."""
    if place.is_file():
        file = read_single_file(place)
        parameters, unet = ARCHITECTURES[file.name].unet_parameters, file.unet_bytes
    else:
        files = unet_files(place, cfg.model.variant)
        parameters = sum(check_safetensors(file) for file in files)
        unet = sum(file.stat().st_size for file in files)
    trained = SCOPE_SHARES[resolved_scope(cfg)] * parameters
    # One more than the limit: a new checkpoint is complete before the oldest is removed.
    kept = cfg.checkpoint.checkpoints_total_limit + 1 if cfg.checkpoint.checkpointing_steps else 0
    return int(MARGIN_BYTES + unet + trained * (4 + STATE_BYTES * kept))
