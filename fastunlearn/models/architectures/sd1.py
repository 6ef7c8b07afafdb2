"""Stable Diffusion 1.x: one CLIP text encoder, four levels, no added condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastunlearn.models.architectures.base import PublicModel, TextEncoder
from fastunlearn.models.architectures.unet2d import (
    CLIP_L,
    NOISE,
    UNET,
    VAE,
    UNet2DArchitecture,
    block_types,
    tiny_model,
)

SD_UNET = UNET | block_types("yyyn") | {"block_out_channels": [320, 640, 1280, 1280]}
SD15 = PublicModel(
    "SD 1.x", "sd1", SD_UNET | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, 859_520_964,
    VAE | {"sample_size": 512, "scaling_factor": 0.18215}, CLIP_L, None,
    NOISE | {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
)  # fmt: skip


class SD1Architecture(UNet2DArchitecture):
    """The adapter; SD 2.x differs in its text encoder only."""

    name = "sd1"
    title = "SD 1.x"
    pipeline = "StableDiffusionPipeline"
    text_encoders = (
        TextEncoder("text_encoder", "tokenizer", "CLIPTextModel", "cond_stage_model.transformer.", open_clip=False),
    )
    models = {"sd15": SD15, "tiny-sd15": tiny_model(SD15, 1_106_212, "yn", {"attention_head_dim": 4})}  # noqa: RUF012
    index = {  # noqa: RUF012
        "safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False,
    }  # fmt: skip

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Without an added condition, and with convolutions around its transformers."""
        known = config.get("_class_name", self.denoiser) == self.denoiser and not config.get("addition_embed_type")
        return known and not config.get("use_linear_projection")

    def folder_refusal(self, index: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
        """No text encoder, or an added condition."""
        if (index.get("text_encoder") or [None])[0] is None:
            return "has no text encoder"
        added = config.get("addition_embed_type")
        return None if added is None else f"is no SD 1.x or 2.x: its U-Net has an added condition {added!r}"


SD1 = SD1Architecture()
