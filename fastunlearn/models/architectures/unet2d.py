"""What SD 1.x, SD 2.x and SDXL share: the names and the call of a ``UNet2DConditionModel``, and configurations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastunlearn.models.architectures.base import Architecture, PublicModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds

TEXT_LENGTH = 77
BLOCK_NAME = re.compile(r"((?:down|up)_blocks\.\d+\.[a-z]+\.\d+|mid_block\.[a-z]+\.\d+)")
LAYER_NAME = re.compile(r"(?:(?:down|up)_blocks\.\d+|mid_block)\.[a-z]+\.\d+(?:\.transformer_blocks\.\d+)?")
# The first and last convolution and what embeds timestep and size: they act on every picture alike, and ESD's code for
# SDXL does not train them. By diffusers' names, and by those of single files.
ENDS = re.compile(
    r"(conv_in|conv_out|time_embedding|add_embedding)(\.|$)"
    r"|model\.diffusion_model\.(input_blocks\.0\.0|out|time_embed|label_emb)(\.|$)"
)
TIME_PROJECTIONS = {"time_emb_proj", "emb_layers"}  # of the ResNet blocks
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")

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
UNET = {
    "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "act_fn": "silu", "norm_num_groups": 32,
    "norm_eps": 1e-5, "layers_per_block": 2, "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0,
    "downsample_padding": 1, "mid_block_scale_factor": 1,
}  # fmt: skip
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def block_types(attends: str) -> dict[str, list[str]]:
    """Block types from a word such as "yyn": whether each level, from fine to coarse, attends."""
    has = [letter == "y" for letter in attends]
    return {"down_block_types": [DOWN[y] for y in has], "up_block_types": [UP[y] for y in reversed(has)]}


TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# Another width than the first: that is how diffusers tells them apart in a single file.
TINY_TEXT_2 = TINY_TEXT | {"hidden_size": 64, "intermediate_size": 128, "projection_dim": 48}
TINY_VAE = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "sample_size": 64}
TINY_UNET = {"sample_size": 8, "block_out_channels": [32, 64], "cross_attention_dim": 32}


def tiny_model(of: PublicModel, parameters: int, attends: str, unet: Mapping[str, Any]) -> PublicModel:
    """The same structure with a million parameters; ``attends`` as for ``block_types``."""
    second = None if of.text_encoder_2 is None else {**of.text_encoder_2, **TINY_TEXT_2}
    return replace(
        of, title=f"a tiny {of.title}", unet={**of.unet, **block_types(attends), **TINY_UNET, **unet},
        unet_parameters=parameters, vae={**of.vae, **TINY_VAE},
        text_encoder={**of.text_encoder, **TINY_TEXT, "projection_dim": 32}, text_encoder_2=second,
    )  # fmt: skip


class UNet2DArchitecture(Architecture):
    """An architecture whose denoiser is a ``UNet2DConditionModel``: attn1 attends to itself, attn2 to the text."""

    denoiser = "UNet2DConditionModel"
    text_length = TEXT_LENGTH

    def block_of(self, name: str) -> str | None:
        """Such as ``down_blocks.1.attentions.0``."""
        found = BLOCK_NAME.match(name)
        return found[1] if found else None

    def layer_of(self, name: str) -> str | None:
        """A transformer block or a ResNet block."""
        found = LAYER_NAME.match(name)
        return found[0] if found else None

    def in_scope(self, module_name: str, scope: str) -> bool:
        """By the attention that a module is part of."""
        parts = module_name.split(".")
        if scope == "noxattn_all":
            return "attn2" not in parts
        if scope == "noxattn":
            return "attn2" not in parts and not (ENDS.match(module_name) or TIME_PROJECTIONS.intersection(parts))
        if scope == "attn":
            return "attn1" in parts or "attn2" in parts
        if scope == "selfattn":
            return "attn1" in parts
        return "attn2" in parts and (scope == "attn2" or parts[-1] in ("to_k", "to_v"))

    def is_attention_projection(self, module_name: str) -> bool:
        """Of attn1 and attn2."""
        return module_name.endswith(PROJECTIONS) and ".attn" in module_name

    def latent_shape(self, config: Mapping[str, Any], side: int | None = None) -> tuple[int, int, int]:
        """Square."""
        side = side or config["sample_size"]
        return config["in_channels"], side, side

    def text_width(self, config: Mapping[str, Any]) -> int:
        """That of the cross-attentions."""
        return config["cross_attention_dim"]

    def call_arguments(self, embeds: PromptEmbeds, fixed: Mapping[str, Tensor], batch: int) -> dict[str, Any]:
        """The token embeddings."""
        return {"encoder_hidden_states": embeds.hidden, "return_dict": False}

    def example_inputs(
        self, config: Mapping[str, Any], batch: int, side: int, tokens: int, dtype: torch.dtype, device: str
    ) -> dict[str, Any]:
        """Latents, timesteps and token embeddings."""
        import torch

        return {
            "sample": torch.empty(batch, *self.latent_shape(config, side), dtype=dtype, device=device),
            "timestep": torch.empty(batch, dtype=torch.long, device=device),
            "encoder_hidden_states": torch.empty(batch, tokens, self.text_width(config), dtype=dtype, device=device),
        }

    def build_denoiser(self, config: Mapping[str, Any]) -> nn.Module:
        """A ``UNet2DConditionModel``."""
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        return UNet2DConditionModel.from_config(dict(config))

    def pipeline_arguments(self, cond: PromptEmbeds, uncond: PromptEmbeds) -> dict[str, Any]:
        """The token embeddings, with and without the prompt."""
        return {"prompt_embeds": cond.hidden, "negative_prompt_embeds": uncond.hidden}
