"""Models that are not edited, by the signs that they give: another noise process, other latents, another denoiser.

What is trained is what is recognised. A noise schedule that nobody stated, or latents that the model shifts, would be
trained to something else without a word: such models are refused by name. The signs are those of configurations and of
single files; tensors' names and shapes tell the rest (``single_file.py``, ``completeness.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SCHEDULERS = {
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler",
    "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler",
    "LCMScheduler", "TCDScheduler",
}  # fmt: skip
"""Samplers of one and the same noise process: alpha-bar as the product of stated betas."""
OTHER_PROCESSES = {
    "FlowM": "flow matching", "RF": "a rectified flow", "EDM": "EDM (its noise levels are not those of betas)",
    "Cosine": "a cosine schedule of noise levels", "KarrasVe": "a variance-exploding process",
    "ScoreSdeVe": "a variance-exploding process", "CMStochastic": "a consistency model", "UnCLIP": "unCLIP",
    "Wuerstchen": "Wuerstchen", "VQDiffusion": "discrete tokens", "Amused": "discrete tokens",
    "SCM": "a consistency model",
}  # fmt: skip
"""Part of a scheduler's class -> what it samples. The first that fits is taken."""
BETA_SCHEDULES = ("scaled_linear", "linear")
BLOCKS = {
    "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn",
}  # fmt: skip
OTHER_INPUTS = {
    "time_cond_proj_dim": "is told the guidance scale (a latent consistency model)",
    "class_embed_type": "takes a class, a noise level or an image as added condition",
    "num_class_embeds": "takes a class or a noise level as added condition",
    "quantization_config": "holds quantised weights",
    "encoder_hid_dim_type": "attends to something else than its text encoders' states",
}
"""A field of the U-Net's configuration that must be empty -> what it means where it is not."""

EDM_MARKERS = {
    "edm_mean": "Playground v2.5 (EDM, latents that are shifted and scaled)",
    "edm_std": "Playground v2.5 (EDM, latents that are shifted and scaled)",
    "edm_vpred.sigma_max": "CosXL, or another model of the EDM process (edm_vpred)",
    "edm_vpred.sigma_min": "CosXL, or another model of the EDM process (edm_vpred)",
    "edm_eps.sigma_max": "a model of the EDM process (edm_eps)",
    "flow": "a flow-matching model",
    "rectified_flow": "a rectified-flow model",
    "flow_matching": "a flow-matching model",
}
"""A tensor without content in a single file -> what trained it."""
PREDICTIONS = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "epsilon": "epsilon",
}
"""As ``modelspec.prediction_type`` has them."""
ARCHITECTURES = ("stable-diffusion-xl-v1-base", "stable-diffusion-v1", "stable-diffusion-v2")
"""How ``modelspec.architecture`` begins for what can be edited."""


def scheduler_class_refusal(kind: str | None) -> str | None:
    """Why a scheduler's class does not sample the noise process that is trained here; None: it does."""
    if kind in SCHEDULERS:
        return None
    known = next((words for part, words in OTHER_PROCESSES.items() if kind and part in kind), None)
    return f"its scheduler is a {kind}" + (f": {known}" if known else "")


def scheduler_refusal(config: Mapping[str, Any]) -> str | None:
    """Why the noise process of a scheduler's configuration is not the one that is trained here; None: it is."""
    kind = config.get("_class_name")
    if (found := scheduler_class_refusal(kind)) is not None:
        return found
    if config.get("use_flow_sigmas"):
        return f"its scheduler ({kind}) has flow-matching noise levels (use_flow_sigmas)"
    if config.get("trained_betas") is not None:
        betas, steps = len(config["trained_betas"]), config.get("num_train_timesteps", 1000)
        return None if betas == steps else f"its scheduler states {betas} trained_betas for {steps} timesteps"
    schedule = config.get("beta_schedule")
    if schedule not in BETA_SCHEDULES and schedule is not None:
        cosine = " (a cosine schedule)" if "cos" in schedule else ""
        return f"its noise schedule is {schedule!r}{cosine}"
    missing = [name for name in ("beta_start", "beta_end", "beta_schedule") if config.get(name) is None]
    if missing:
        return f"its scheduler's configuration does not state {' and '.join(missing)}"
    if config["beta_start"] >= config["beta_end"]:
        return "its noise does not grow: beta_start is not below beta_end"
    return None


def vae_refusal(config: Mapping[str, Any]) -> str | None:
    """Why latents of a VAE's configuration are not those that are trained here; None: they are."""
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        return f"its VAE is a {kind}"
    for field in ("latents_mean", "latents_std", "shift_factor"):
        if config.get(field):
            return f"its VAE shifts or scales latents by {field}"
    channels = config.get("latent_channels", 4)
    return None if channels == 4 else f"its VAE has {channels} latent channels"


def unet_refusal(config: Mapping[str, Any]) -> str | None:
    """Why a U-Net's configuration is not one that can be edited; None: it is."""
    for field, words in OTHER_INPUTS.items():
        if config.get(field) is not None:
            return f"its U-Net {words} ({field})"
    blocks = [*(config.get("down_block_types") or ()), *(config.get("up_block_types") or ())]
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    other = next((block for block in (*blocks, middle) if block not in BLOCKS), None)
    if other is not None:
        return f"its U-Net has a block of another kind ({other})"
    if config.get("out_channels", 4) != 4:
        return f"its U-Net gives {config['out_channels']} channels"
    return None


def marker_refusal(names: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """What a single file says of itself that cannot be edited; None: nothing."""
    for name in names:
        if name in EDM_MARKERS:
            return EDM_MARKERS[name]
    stated = metadata.get("modelspec.prediction_type", "")
    if stated and stated.lower() not in PREDICTIONS:
        return f"a model that predicts {stated[:40]!r} (modelspec.prediction_type)"
    architecture = metadata.get("modelspec.architecture", "").lower()
    if architecture and not architecture.startswith(ARCHITECTURES):
        return f"of the architecture {architecture[:60]!r} (modelspec.architecture)"
    if "/lora" in architecture or "/textual-inversion" in architecture:
        return f"no whole model ({architecture[:60]})"
    return None
