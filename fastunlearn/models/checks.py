"""Refusals of a model that its files tell of without loading it: missing, of another kind, damaged, contradictory.

Reads file headers only. Of a hub id only what the hub's cache holds is checked; ``loading.py`` reports what the hub
answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastunlearn.config import Config, ModelConfig
from fastunlearn.errors import UserError, nearest
from fastunlearn.minicanvas import pipeline_path
from fastunlearn.models.formats.configurations import read_config
from fastunlearn.models.formats.folders import check_dtypes, check_folder, check_kind, vae_folder
from fastunlearn.models.formats.foreign import vae_refusal
from fastunlearn.models.formats.headers import FIELD, is_hub_id, read_header
from fastunlearn.models.formats.single_file import is_vae, read_single_file


def check_model(cfg: Config) -> Path | None:
    """Refuse a model that is missing, of another kind, or damaged; return its folder or file, or None for a hub id.

    Raises:
        UserError: with the path, and the nearest sibling where there is one.
    """
    name = cfg.model.pretrained_model_name_or_path
    place = pipeline_path() if cfg.uses_minicanvas else Path(name)
    if not place.exists() and is_hub_id(name):
        check_hub_cache(cfg.model)
        check_noise(cfg.model, {})
        return None
    if place.is_file():
        _check_file(place, cfg)
    elif place.is_dir():
        check_folder(place, cfg.model.variant)
        check_noise(cfg.model, read_config(place / "scheduler" / "scheduler_config.json"))
        check_vae(cfg.model, read_config(place / "vae" / "config.json"))
    else:
        _refuse_path(name, place)
    return place


def _check_file(file: Path, cfg: Config) -> None:
    found = read_single_file(file)
    known = found.public_model(cfg.model)
    if cfg.model.variant is not None:
        raise UserError(f"model.variant: {cfg.model.variant!r} is for folders and hub ids; {str(file)!r} is one file")
    if cfg.model.vae is None and not found.has_vae:
        raise UserError(f"{FIELD}: {str(file)!r} holds no VAE; give one in model.vae")
    check_noise(cfg.model, known.scheduler)
    check_vae(cfg.model, known.vae)


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
        config = read_config(folder / "config.json", "vae")
        if config.get("_class_name") != "AutoencoderKL":
            found = f"holds a {config['_class_name']}" if "_class_name" in config else "has no VAE's config.json"
            raise UserError(f"model.vae: {model.vae!r} {found}; a folder with an AutoencoderKL is needed")
        foreign = vae_refusal(config)
        if foreign is not None:
            raise UserError(f"model.vae: {model.vae!r} is made for another model: {foreign}")
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
            check_dtypes(file)
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
