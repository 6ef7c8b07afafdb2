"""SDXL-base: two text encoders side by side, the pooled state of the second and the image's size as added condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastunlearn.models.architectures.base import PublicModel, TextEncoder
from fastunlearn.models.architectures.unet2d import (
    CLIP,
    CLIP_L,
    NOISE,
    UNET,
    VAE,
    UNet2DArchitecture,
    block_types,
    tiny_model,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds

TIME_IDS = 6  # numbers: height and width of the original, upper left corner of the crop, height and width of the target
CLIP_BIG_G = CLIP | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
SDXL_UNET = UNET | block_types("nyy") | {
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SDXL_BASE = PublicModel(
    "SDXL-base", "sdxl", SDXL_UNET, 2_567_463_684,
    VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}, CLIP_L, CLIP_BIG_G,
    NOISE | {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": False},
)  # fmt: skip
TINY = {
    "cross_attention_dim": 96, "transformer_layers_per_block": [1, 2], "attention_head_dim": [2, 4],
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": TIME_IDS * 8 + 48,
}  # fmt: skip


class SDXLArchitecture(UNet2DArchitecture):
    """The adapter."""

    name = "sdxl"
    title = "SDXL-base"
    pipeline = "StableDiffusionXLPipeline"
    text_encoders = (
        TextEncoder(
            "text_encoder", "tokenizer", "CLIPTextModel", "conditioner.embedders.0.transformer.", open_clip=False
        ),
        TextEncoder(
            "text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", "conditioner.embedders.1.model.",
            open_clip=True,
        ),
    )  # fmt: skip
    models = {"sdxl": SDXL_BASE, "tiny-sdxl": tiny_model(SDXL_BASE, 2_027_716, "ny", TINY)}  # noqa: RUF012
    index = {"force_zeros_for_empty_prompt": True}  # noqa: RUF012

    def fits(self, config: Mapping[str, Any]) -> bool:
        """With pooled text and sizes as added condition."""
        known = config.get("_class_name", self.denoiser) == self.denoiser
        return known and config.get("addition_embed_type") == "text_time"

    def folder_refusal(self, index: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
        """The refiner, and U-Nets with another added condition."""
        first, second = ((index.get(slot.name) or [None])[0] for slot in self.text_encoders)
        if index.get("requires_aesthetics_score") or first is None:
            return "is SDXL's refiner (it has no first text encoder, or asks for an aesthetic score)"
        if second is None:
            return "has no second text encoder"
        added = config.get("addition_embed_type")
        if config and added != "text_time":
            return f"is no SDXL-base: the added condition of its U-Net is {added!r}, not 'text_time'"
        return None

    def pooled_width(self, config: Mapping[str, Any]) -> int:
        """What the added condition has beside the sizes."""
        return config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]

    def fixed_inputs(self, pixels: int, device: torch.device | str) -> dict[str, Tensor]:
        """time_ids (1, 6) fp32: an image of this size that was not cropped."""
        import torch

        side = float(pixels)
        return {"time_ids": torch.tensor([[side, side, 0.0, 0.0, side, side]], device=device)}

    def call_arguments(self, embeds: PromptEmbeds, fixed: Mapping[str, Tensor], batch: int) -> dict[str, Any]:
        """Token embeddings, pooled text and time ids."""
        assert embeds.pooled is not None
        time_ids = fixed["time_ids"].to(embeds.pooled.dtype).expand(batch, -1)
        added = {"text_embeds": embeds.pooled, "time_ids": time_ids}
        return super().call_arguments(embeds, fixed, batch) | {"added_cond_kwargs": added}

    def example_inputs(
        self, config: Mapping[str, Any], batch: int, side: int, tokens: int, dtype: torch.dtype, device: str
    ) -> dict[str, Any]:
        """Also pooled text and time ids."""
        import torch

        widths = {"text_embeds": self.pooled_width(config), "time_ids": TIME_IDS}
        added = {name: torch.empty(batch, width, dtype=dtype, device=device) for name, width in widths.items()}
        return super().example_inputs(config, batch, side, tokens, dtype, device) | {"added_cond_kwargs": added}

    def pipeline_arguments(self, cond: PromptEmbeds, uncond: PromptEmbeds) -> dict[str, Any]:
        """Token embeddings and pooled text."""
        pooled = {"pooled_prompt_embeds": cond.pooled, "negative_pooled_prompt_embeds": uncond.pooled}
        return super().pipeline_arguments(cond, uncond) | pooled


SDXL = SDXLArchitecture()
