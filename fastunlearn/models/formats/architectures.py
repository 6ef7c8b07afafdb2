"""The public architectures that can be edited, as configurations: SD 1.x, SD 2.x and SDXL-base, and a tiny one of each.

What this is: what a diffusers folder says about a model, without its weights: for a single file, which does not say it,
and for models with random weights. Standard library only.
What this is not: loading (``loading.py``), or telling which of them a file holds (``single_file.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

VOCABULARY = Path(__file__).parent / "clip_vocabulary" / "merges.txt"
START, END = "<|startoftext|>", "<|endoftext|>"
TEXT_LENGTH = 77

NOISE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "trained_betas": None, "steps_offset": 1, "timestep_spacing": "leading", "prediction_type": "epsilon",
    "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4, "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
CLIP = {
    "model_type": "clip_text_model", "vocab_size": 49408, "max_position_embeddings": TEXT_LENGTH,
    "attention_dropout": 0.0, "layer_norm_eps": 1e-5, "initializer_factor": 1.0, "initializer_range": 0.02,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "dtype": "float32",
}  # fmt: skip
CLIP_L = CLIP | {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
CLIP_H = CLIP | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 512, "hidden_act": "gelu",
}  # fmt: skip
CLIP_BIG_G = CLIP | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
UNET = {
    "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "act_fn": "silu", "norm_num_groups": 32,
    "norm_eps": 1e-5, "layers_per_block": 2, "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0,
    "downsample_padding": 1, "mid_block_scale_factor": 1,
}  # fmt: skip
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def _levels(attends: str) -> dict[str, list[str]]:
    """Block types from a word such as "yyn": whether each level, from fine to coarse, attends."""
    has = [letter == "y" for letter in attends]
    return {"down_block_types": [DOWN[y] for y in has], "up_block_types": [UP[y] for y in reversed(has)]}


SD_UNET = UNET | _levels("yyyn") | {"block_out_channels": [320, 640, 1280, 1280]}
SDXL_UNET = UNET | _levels("nyy") | {
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One model, as its folder describes it."""

    title: str
    family: str
    """"sd1", "sd2" or "sdxl": which text encoders it has and how a single file names their tensors."""
    unet: Mapping[str, Any]
    unet_parameters: int
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    text_encoder_2: Mapping[str, Any] | None
    scheduler: Mapping[str, Any]

    @property
    def pipeline(self) -> str:
        """The class of its diffusers pipeline."""
        return "StableDiffusionXLPipeline" if self.family == "sdxl" else "StableDiffusionPipeline"

    @property
    def factor(self) -> int:
        """Pixels per latent."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    def with_prediction(self, prediction_type: str, zero_snr: bool) -> Architecture:
        """The same architecture trained to predict something else, or on another noise schedule."""
        scheduler = dict(self.scheduler) | {"prediction_type": prediction_type}
        if zero_snr:
            scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            if scheduler["_class_name"] == "PNDMScheduler":  # it cannot rescale
                scheduler["_class_name"] = "DDIMScheduler"
        unet = dict(self.unet)
        if self.family == "sd2" and unet["sample_size"] == 96 and prediction_type == "epsilon":
            unet["sample_size"] = 64  # the base model of SD 2.x, made for 512 pixels
        return replace(self, scheduler=scheduler, unet=unet)

    def with_small_text_encoders(self) -> Architecture:
        """Text encoders of two layers and the same widths."""
        second = None if self.text_encoder_2 is None else dict(self.text_encoder_2) | {"num_hidden_layers": 2}
        return replace(self, text_encoder=dict(self.text_encoder) | {"num_hidden_layers": 2}, text_encoder_2=second)


SDXL = Architecture(
    "SDXL-base", "sdxl", SDXL_UNET, 2_567_463_684,
    VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}, CLIP_L, CLIP_BIG_G,
    NOISE | {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": False},
)  # fmt: skip
SD15 = Architecture(
    "SD 1.x", "sd1", SD_UNET | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, 859_520_964,
    VAE | {"sample_size": 512, "scaling_factor": 0.18215}, CLIP_L, None,
    NOISE | {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
)  # fmt: skip
SD21 = Architecture(
    "SD 2.x", "sd2",
    SD_UNET | {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
               "use_linear_projection": True, "upcast_attention": True}, 865_910_724,
    VAE | {"sample_size": 768, "scaling_factor": 0.18215}, CLIP_H, None,
    NOISE | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
)  # fmt: skip

TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# Another width than the first: that is how diffusers tells them apart in a single file.
TINY_TEXT_2 = TINY_TEXT | {"hidden_size": 64, "intermediate_size": 128, "projection_dim": 48}
TINY_VAE = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "sample_size": 64}
TINY_UNET = {"sample_size": 8, "block_out_channels": [32, 64], "cross_attention_dim": 32}


def _tiny(of: Architecture, parameters: int, attends: str, unet: Mapping[str, Any]) -> Architecture:
    second = None if of.text_encoder_2 is None else {**of.text_encoder_2, **TINY_TEXT_2}
    return replace(
        of, title=f"a tiny {of.title}", unet={**of.unet, **_levels(attends), **TINY_UNET, **unet},
        unet_parameters=parameters, vae={**of.vae, **TINY_VAE},
        text_encoder={**of.text_encoder, **TINY_TEXT, "projection_dim": 32}, text_encoder_2=second,
    )  # fmt: skip


ARCHITECTURES = {
    "sdxl": SDXL,
    "sd15": SD15,
    "sd21": SD21,
    "tiny-sdxl": _tiny(SDXL, 2_027_716, "ny", {
        "cross_attention_dim": 96, "transformer_layers_per_block": [1, 2], "attention_head_dim": [2, 4],
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 48,
    }),
    "tiny-sd15": _tiny(SD15, 1_106_212, "yn", {"attention_head_dim": 4}),
    "tiny-sd21": _tiny(SD21, 1_106_212, "yn", {"attention_head_dim": [2, 4]}),
}  # fmt: skip


def write_configs(architecture: Architecture, folder: Path) -> None:
    """Write everything of a diffusers folder but the weights: configurations and tokenizers."""
    from diffusers import __version__ as diffusers_version

    encoders = {"text_encoder": ("CLIPTextModel", architecture.text_encoder)}
    if architecture.text_encoder_2 is not None:
        encoders["text_encoder_2"] = ("CLIPTextModelWithProjection", architecture.text_encoder_2)
    version = {"_diffusers_version": diffusers_version}
    index: dict[str, Any] = {"_class_name": architecture.pipeline, **version}
    for name, content in (("unet", architecture.unet), ("vae", architecture.vae)):
        index[name] = ["diffusers", content["_class_name"]]
        _write_json(folder / name / "config.json", {**content, **version})
    index["scheduler"] = ["diffusers", architecture.scheduler["_class_name"]]
    _write_json(folder / "scheduler" / "scheduler_config.json", {**architecture.scheduler, **version})
    for name, (kind, content) in encoders.items():
        index[name] = ["transformers", kind]
        _write_json(folder / name / "config.json", {"architectures": [kind], **content})
        tokenizer = name.replace("text_encoder", "tokenizer")
        index[tokenizer] = ["transformers", "CLIPTokenizer"]
        # CLIP-L was trained with the end of the text as padding; OpenCLIP's encoders with entry 0.
        openclip = architecture.family == "sd2" or name == "text_encoder_2"
        write_tokenizer(folder / tokenizer, "!" if openclip else END)
    if architecture.family == "sdxl":
        index |= {"force_zeros_for_empty_prompt": True}
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    _write_json(folder / "model_index.json", index)


def write_tokenizer(folder: Path, padding: str) -> None:
    """CLIP's tokenizer, as transformers reads it."""
    merges = VOCABULARY.read_text(encoding="utf-8")
    _write_json(folder / "vocab.json", clip_vocabulary(merges))
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END, "unk_token": END,
            "pad_token": padding, "model_max_length": TEXT_LENGTH, "do_lower_case": True, "add_prefix_space": False,
        },
    )  # fmt: skip


def clip_vocabulary(merges: str) -> dict[str, int]:
    """Entry -> number: the 256 bytes, the same at the end of a word, one entry per merge, start and end of the text."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = range(256 - len(shown))  # spaces and controls, which a text file cannot show, are written as letters
    letters = [chr(byte) for byte in shown] + [chr(256 + i) for i in hidden]
    joined = ["".join(line.split()) for line in merges.splitlines()[1:]]
    entries = [*letters, *(f"{letter}</w>" for letter in letters), *joined, START, END]
    return {entry: number for number, entry in enumerate(entries)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(deepcopy(dict(content)), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
