"""Loading Stable Diffusion as users have it: a diffusers folder, a hub id, or one ``.safetensors`` file.

The one place that turns ``[model]`` into a pipeline with its weights. Nothing is fetched that is here. What can be told
without loading is refused before, in ``checks.py``.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils.logging import disable_progress_bar
from torch import nn

from fastunlearn.config import ModelConfig
from fastunlearn.errors import UserError
from fastunlearn.models.checks import check_noise, check_vae
from fastunlearn.models.formats.completeness import check_component, check_single_file
from fastunlearn.models.formats.configurations import read_config
from fastunlearn.models.formats.folder_configs import write_configs
from fastunlearn.models.formats.folders import ALLOWED, check_folder, check_kind, vae_folder, weight_files
from fastunlearn.models.formats.headers import FIELD, is_hub_id, read_header
from fastunlearn.models.formats.single_file import read_single_file
from fastunlearn.utils.dtypes import SAFETENSORS
from fastunlearn.utils.text import first_line

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline
CLASSES = {"StableDiffusionPipeline": StableDiffusionPipeline, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}


def load_pipeline(
    path: str | os.PathLike[str],
    *,
    unet_path: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    unet_dtype: torch.dtype | None = None,
    options: ModelConfig | None = None,
) -> Pipeline:
    """Load an SD or SDXL text-to-image pipeline, optionally with another U-Net.

    Args:
        path: a folder, a .safetensors file, a hub id or "minicanvas".
        unet_path: a folder with the U-Net to load instead.
        dtype: of all weights. fp32 is the one in which every VAE is safe: SDXL's own overflows in fp16.
        unet_dtype: of the U-Net's weights; None: ``dtype``. ``stored_dtype`` loses nothing and takes least memory.
        options: revision, variant, cache, VAE and what the model predicts.

    Raises:
        UserError: the model cannot be found or read, or is not an SD/SDXL text-to-image pipeline.
    """
    disable_progress_bar()  # the loading bars of seven small components say nothing
    model = (options or ModelConfig()).model_copy(update={"pretrained_model_name_or_path": str(path)})
    place, source = local_model(model), str(path)
    unet = None if unet_path is None else load_unet(unet_path, unet_dtype or dtype)
    try:
        if place.is_file():
            pipeline = _from_file(place, model, dtype, unet_dtype or dtype, unet)
        else:
            pipeline = _from_folder(place, model, dtype, unet_dtype or dtype, unet)
    except UserError:
        raise
    except Exception as error:  # whatever a file that is not ours provokes
        raise UserError(f"{FIELD}: cannot load {source!r}: {first_line(error)[:200]}") from error
    # Exact classes: inpainting, refiner and other pipelines subclass or imitate these and need other inputs.
    if type(pipeline) not in CLASSES.values():
        raise UserError(f"{FIELD}: {source!r} is a {type(pipeline).__name__}; {ALLOWED}")
    if model.vae is not None:
        pipeline.vae = load_vae(model.vae, pipeline.vae, dtype)
    set_noise(pipeline, model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _from_folder(
    folder: Path, model: ModelConfig, dtype: torch.dtype, unet_dtype: torch.dtype, unet: nn.Module | None
) -> Pipeline:
    for component in check_folder(folder, model.variant):
        if component != "unet" or unet is None:
            config = read_config(folder / component / "config.json")
            check_component(folder / component, component, config, model.variant)
    kwargs: dict[str, Any] = {"dtype": {"default": dtype, "unet": unet_dtype}, "use_safetensors": True}
    if unet is not None:
        kwargs["unet"] = unet
    index = read_config(folder / "model_index.json")
    kwargs |= _unused_parts(index)
    # The class itself, not DiffusionPipeline, knows which of its parts may be left out.
    return CLASSES[index["_class_name"]].from_pretrained(folder, variant=model.variant, local_files_only=True, **kwargs)


def _unused_parts(index: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of a pipeline that are never called here, so that they keep no model out, absent, pickled or broken."""
    if "safety_checker" in index:
        parts = ("safety_checker", "feature_extractor", "image_encoder")
        return dict.fromkeys(parts) | {"requires_safety_checker": False}
    return {name: None for name in ("feature_extractor", "image_encoder") if name in index}


def local_model(model: ModelConfig) -> Path:
    """The folder or file of a model on this machine; what a hub has is fetched or taken from the cache.

    Raises:
        UserError: it is not there, or of another kind; then nothing of it has been fetched but configurations.
    """
    name = resolve_model(model.pretrained_model_name_or_path)
    if Path(name).exists() or not is_hub_id(name):
        return Path(name)
    configs = hub_configs(name, model)
    check_vae(model, read_config(configs / "vae" / "config.json"))
    known: dict[str, Any] = {
        "revision": model.revision, "cache_dir": model.cache_dir, "local_files_only": model.local_files_only,
    }  # fmt: skip
    content = read_config(configs / "model_index.json")
    kind, skipped = CLASSES[content["_class_name"]], _unused_parts(content)
    try:
        return Path(kind.download(name, variant=model.variant, use_safetensors=True, **known, **skipped))
    except Exception as error:  # whatever it is: there are many
        raise UserError(f"{FIELD}: cannot fetch {name!r}: {first_line(error)[:120]}") from None


def hub_configs(name: str, model: ModelConfig) -> Path:
    """The folder with a hub model's configurations, all that are needed to tell whether it can be edited.

    Raises:
        UserError: as ``hub_file``; or it is another kind of model, which ``model_index.json`` alone may tell.
    """
    folder = hub_file(name, "model_index.json", model).parent
    check_kind(folder, name)  # another kind need not have the other files
    for part in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        hub_file(name, part, model)
    check_kind(folder, name)
    return folder


def hub_file(name: str, path: str, model: ModelConfig) -> Path:
    """One small file of a hub model, downloaded or from the cache.

    Raises:
        UserError: with what the hub, the network or the cache answers.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(
                name, path, revision=model.revision, cache_dir=model.cache_dir, local_files_only=model.local_files_only
            )
        )
    except Exception as error:  # whatever it is: there are many
        raise UserError(f"{FIELD}: cannot read {path} of {name!r}: {first_line(error)[:120]}") from None


def _from_file(
    file: Path, model: ModelConfig, dtype: torch.dtype, unet_dtype: torch.dtype, unet: nn.Module | None
) -> Pipeline:
    """Configurations and tokenizers come from ``architectures/``, so that nothing is fetched."""
    found = read_single_file(file)
    known = found.public_model(model)
    check_single_file(file, known, found.has_vae)
    with tempfile.TemporaryDirectory() as configs:
        write_configs(known, Path(configs))
        kwargs: dict[str, Any] = {"config": configs, "local_files_only": True}
        if unet is None and unet_dtype != dtype:
            unet = UNet2DConditionModel.from_single_file(str(file), subfolder="unet", dtype=unet_dtype, **kwargs)
        parts = {} if unet is None else {"unet": unet}
        if not found.has_vae:  # model.vae takes its place
            parts["vae"] = AutoencoderKL.from_config(dict(known.vae))
        pipeline = CLASSES[known.pipeline].from_single_file(str(file), dtype=dtype, **kwargs, **parts)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            _check_complete(part, f"{FIELD}: {str(file)!r}", name)
    return pipeline


def _check_complete(part: nn.Module, said: str, name: str) -> None:
    """Tensors that the file lacks have been left without memory."""
    missing = [tensor for tensor, parameter in part.named_parameters() if parameter.is_meta]
    if missing:
        raise UserError(f"{said} lacks {len(missing)} tensors of its {name}, such as {missing[0]}; download it again")


def load_unet(folder: str | os.PathLike[str], dtype: torch.dtype) -> UNet2DConditionModel:
    """A U-Net from a folder in diffusers format.

    Raises:
        UserError: it is missing or damaged.
    """
    place = Path(folder)
    check_component(place, "unet", read_config(place / "config.json", "unet"), None)
    try:
        return UNet2DConditionModel.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except Exception as error:
        raise UserError(f"unet: cannot load {str(folder)!r}: {first_line(error)}") from error


def load_vae(place: str, own: AutoencoderKL, dtype: torch.dtype) -> AutoencoderKL:
    """Another VAE for a pipeline whose own is ``own``: from a folder, or a file in diffusers' or the original layout.

    Raises:
        UserError: it is missing or damaged, or not of this pipeline's shape.
    """
    try:
        if Path(place).is_dir():
            folder = vae_folder(Path(place))
            check_component(folder, "vae", read_config(folder / "config.json", "vae"), None)
            return AutoencoderKL.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
        with tempfile.TemporaryDirectory() as configs:  # a file has no configuration: that of the VAE it replaces
            own.save_config(configs)
            vae = AutoencoderKL.from_single_file(place, config=configs, dtype=dtype, local_files_only=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model.vae: cannot load {place!r}: {first_line(error)}") from error
    _check_complete(vae, f"model.vae: {place!r}", "VAE")
    return vae


def set_noise(pipeline: Pipeline, model: ModelConfig) -> None:
    """Let the pipeline's scheduler say what the configuration states.

    Raises:
        UserError: the statement contradicts itself, or the model.
    """
    config = pipeline.scheduler.config
    check_noise(model, config)
    stated: dict[str, Any] = {}
    if model.prediction_type != "auto":
        stated["prediction_type"] = model.prediction_type
    if model.rescale_betas_zero_snr != "auto":
        stated["rescale_betas_zero_snr"] = model.rescale_betas_zero_snr
        if model.rescale_betas_zero_snr:
            stated["timestep_spacing"] = "trailing"  # such a model is sampled from its very last step
    if all(config.get(field, False) == value for field, value in stated.items()):
        return
    kind = type(pipeline.scheduler)
    if "rescale_betas_zero_snr" in stated and "rescale_betas_zero_snr" not in inspect.signature(kind).parameters:
        kind = DDIMScheduler
    pipeline.register_modules(scheduler=kind.from_config(config, **stated))


def resolve_model(name: str) -> str:
    """Turn the embedded model's name into its folder; other names pass through."""
    if name != "minicanvas":
        return name
    from fastunlearn.minicanvas import pipeline_path

    return str(pipeline_path())


def stored_dtype(model: ModelConfig) -> torch.dtype:
    """The floating dtype in which the base U-Net's files hold most of their tensors.

    Raises:
        UserError: as ``local_model``.
    """
    place = local_model(model)
    if place.is_file():
        return SAFETENSORS.get(read_single_file(place).unet_dtype, torch.float32)
    files = weight_files(place / "unet", model.variant)
    counts = Counter(entry.dtype for file in files for entry in read_header(file)[0].values())
    return SAFETENSORS.get(counts.most_common(1)[0][0], torch.float32)
