"""One ``.safetensors`` file that holds a whole model, as it is shared on Civitai and elsewhere: what is in it.

The kind of model is told from the names and shapes in the file's header alone; loading is ``models/loading.py``. A file
does not say everything: what it predicts is in its metadata, or in a marker, or must be stated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastunlearn.errors import UserError
from fastunlearn.models.architectures.base import Architecture, PublicModel
from fastunlearn.models.formats.folder_configs import PUBLIC_MODELS
from fastunlearn.models.formats.folders import CHANNELS, EDITABLE, check_dtypes
from fastunlearn.models.formats.foreign import PREDICTIONS, marker_refusal
from fastunlearn.models.formats.headers import FIELD, Entry, read_header
from fastunlearn.registry import ARCHITECTURES
from fastunlearn.schema.sections import ModelConfig

UNET, VAE = "model.diffusion_model.", ("first_stage_model.", "vae.")
FIRST_CONV = "input_blocks.0.0.weight"
REFINER_TEXT = "conditioner.embedders.0.model."
OLD_CLIP_L = "cond_stage_model.transformer."
WHOLE = "give the whole checkpoint that it came from, or a diffusers folder with it"
ALLOWED = f"allowed are whole models of {EDITABLE}"
# Tensors without content that say how the model was trained (NoobAI and others put them in).
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
SCALED_FP8 = "scaled_fp8"

LORA_PARTS = (".lora_", "lora_up", "lora_down", "lora_A", "lora_B", ".hada_", ".lokr_", ".oft_", ".dora_scale")
# Other architectures, by a part of a tensor's name that only they have; the first that is found is named.
OTHERS = {
    "joint_blocks.": "SD3",
    "double_blocks.": "FLUX, or a model built like it",
    "adaln_single.": "PixArt",
    "clip_txt_mapper.": "Stable Cascade",
    "double_layers.": "AuraFlow",
    "control_model.": "a ControlNet",
    "controlnet_": "a ControlNet",
    "motion_modules.": "AnimateDiff",
}


@dataclass(frozen=True)
class SingleFile:
    """What a single file holds."""

    path: Path
    name: str
    """Its entry in ``PUBLIC_MODELS``."""
    said_prediction: str | None
    """"epsilon" or "v_prediction" where the file says so."""
    zero_snr: bool
    """Whether the file says that its noise schedule ends in pure noise."""
    has_vae: bool
    unet_dtype: str
    """That of most tensors of its U-Net, as safetensors writes it: "F16", "BF16" or "F32"."""
    unet_shapes: Mapping[str, tuple[int, ...]]
    """By the names that the file has for them."""
    unet_bytes: int
    elements: int
    """Of all tensors."""

    @property
    def unet_config(self) -> Mapping[str, Any]:
        """Of the public model that it is."""
        return PUBLIC_MODELS[self.name].unet

    def public_model(self, model: ModelConfig) -> PublicModel:
        """With what it predicts as the file says it, unless the configuration does.

        Raises:
            UserError: nobody says it, and it cannot be guessed.
        """
        known = PUBLIC_MODELS[self.name]
        stated = model.prediction_type if model.prediction_type != "auto" else None
        prediction = stated or self.said_prediction or known.adapter.usual_prediction
        if prediction is None:
            raise UserError(
                f"model.prediction_type: {str(self.path)!r} is {known.title}, and does not say what it predicts; "
                "state 'v_prediction' (the 768 pixel models) or 'epsilon' (the 512 pixel base models)"
            )
        zero_snr = model.rescale_betas_zero_snr
        return known.with_prediction(prediction, self.zero_snr if zero_snr == "auto" else bool(zero_snr))


def read_single_file(path: Path) -> SingleFile:
    """Tell what a file holds from its header.

    Raises:
        UserError: it is damaged, or something else than a whole model that can be edited; says what it is.
    """
    if path.suffix.lower() != ".safetensors":
        raise UserError(
            f"{FIELD}: {str(path)!r} is no .safetensors file; a diffusers folder or one .safetensors file is needed "
            "(pickled weights are not read)"
        )
    entries, metadata = read_header(path)
    found = marker_refusal(entries, metadata) or identify(entries)
    if found not in PUBLIC_MODELS:
        raise UserError(f"{FIELD}: {str(path)!r} is {found}; {ALLOWED}")
    if SCALED_FP8 in entries or any(name.endswith((".scale_weight", ".weight_scale")) for name in entries):
        raise UserError(
            f"{FIELD}: {str(path)!r} holds weights in fp8 with scales, as ComfyUI makes them; the file in fp16, bf16 "
            "or fp32 is needed"
        )
    check_dtypes(path)
    unet = {name: entry for name, entry in entries.items() if name.startswith(UNET)}
    dtypes = Counter(entry.dtype for entry in unet.values())
    prediction = PREDICTIONS.get(metadata.get("modelspec.prediction_type", "").lower())
    return SingleFile(
        path=path,
        name=found,
        said_prediction="v_prediction" if V_MARKER in entries else prediction,
        zero_snr=ZERO_SNR_MARKER in entries,
        has_vae=any(name.startswith(VAE) for name in entries),
        unet_dtype=dtypes.most_common(1)[0][0],
        unet_shapes={name: entry.shape for name, entry in unet.items()},
        unet_bytes=sum(entry.bytes for entry in unet.values()),
        elements=sum(entry.elements for entry in entries.values()),
    )


def identify(entries: Mapping[str, Entry]) -> str:
    """The name of an entry of ``PUBLIC_MODELS``, or in words what the tensors are instead."""
    if _any(entries, LORA_PARTS):
        return "a LoRA (merge it into its base model first)"
    other = next((words for part, words in OTHERS.items() if _any(entries, (part,))), None)
    if other is not None:
        return other
    conv = entries.get(UNET + FIRST_CONV)
    if conv is None or len(conv.shape) != 4:
        return _part(entries)
    channels = conv.shape[1]
    if channels != 4:
        return f"{CHANNELS.get(channels, 'another model')} (its U-Net takes {channels} channels)"
    for architecture in ARCHITECTURES.values():
        if all(_starts(entries, encoder.mark) for encoder in architecture.text_encoders):
            return _of_architecture(architecture, entries)
    return _without_text(entries)


def _of_architecture(architecture: Architecture, entries: Mapping[str, Entry]) -> str:
    parameters = sum(entry.elements for name, entry in entries.items() if name.startswith(UNET))
    fits = [name for name, model in architecture.models.items() if model.unet_parameters == parameters]
    if fits:
        return fits[0]
    usual = next(iter(architecture.models.values()))
    return (
        f"no {usual.title}: its U-Net has {parameters:,} parameters instead of {usual.unet_parameters:,} "
        "(pruned or distilled; give it as a diffusers folder)"
    )


def _without_text(entries: Mapping[str, Entry]) -> str:
    """In words, what is wrong with the text encoders of a file that has a U-Net."""
    if _starts(entries, REFINER_TEXT):
        return "SDXL's refiner"
    if _starts(entries, OLD_CLIP_L):
        return "an SD 1.x model with an old layout of its text encoder (convert it to a diffusers folder)"
    several = [a for a in ARCHITECTURES.values() if len(a.text_encoders) > 1]
    if any(_starts(entries, encoder.mark) for a in several for encoder in a.text_encoders):
        return "an SDXL model with one of its two text encoders"
    return f"a U-Net without its text encoders: {WHOLE}"


def _part(entries: Mapping[str, Entry]) -> str:
    """In words, what a file is that has no U-Net under the usual name."""
    if FIRST_CONV in entries or any(name.startswith(("down_blocks.", "up_blocks.")) for name in entries):
        return f"a bare U-Net (as in ComfyUI's diffusion_models folder), without VAE and text encoders: {WHOLE}"
    if _starts(entries, UNET):
        return "another architecture than Stable Diffusion's"
    if is_vae(entries):
        return "a VAE (model.vae takes one)"
    if _any(entries, ("text_model.", "resblocks.")):
        return "a text encoder alone"
    few = 0 < len(entries) <= 4 and all(len(entry.shape) == 2 for entry in entries.values())
    if few or _any(entries, ("emb_params", "string_to_param")):
        return "an embedding (textual inversion)"
    return "no model that is known here"


def is_vae(entries: Iterable[str]) -> bool:
    """Whether these are names of a VAE alone, with or without a prefix."""
    bare = {name.removeprefix(VAE[0]).removeprefix(VAE[1]) for name in entries}
    return bool(bare) and all(
        name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "loss.", "model_ema."))
        for name in bare
    )


def _any(entries: Iterable[str], parts: tuple[str, ...]) -> bool:
    return any(part in name for name in entries for part in parts)


def _starts(entries: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in entries)
