"""Stable Diffusion 2.x: as SD 1.x, with OpenCLIP's text encoder and linear projections; some models predict v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastunlearn.models.architectures.base import PublicModel, TextEncoder
from fastunlearn.models.architectures.sd1 import SD_UNET, SD1Architecture
from fastunlearn.models.architectures.unet2d import CLIP, NOISE, VAE, tiny_model

CLIP_H = CLIP | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 512, "hidden_act": "gelu",
}  # fmt: skip
SD21 = PublicModel(
    "SD 2.x", "sd2",
    SD_UNET | {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
               "use_linear_projection": True, "upcast_attention": True}, 865_910_724,
    VAE | {"sample_size": 768, "scaling_factor": 0.18215}, CLIP_H, None,
    NOISE | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
)  # fmt: skip


class SD2Architecture(SD1Architecture):
    """The adapter."""

    name = "sd2"
    title = "SD 2.x"
    text_encoders = (
        TextEncoder("text_encoder", "tokenizer", "CLIPTextModel", "cond_stage_model.model.", open_clip=True),
    )
    models = {"sd21": SD21, "tiny-sd21": tiny_model(SD21, 1_106_212, "yn", {"attention_head_dim": [2, 4]})}  # noqa: RUF012
    usual_prediction = None

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Without an added condition, and with linear projections around its transformers."""
        known = config.get("_class_name", self.denoiser) == self.denoiser and not config.get("addition_embed_type")
        return known and bool(config.get("use_linear_projection"))

    def unet_predicting(self, config: Mapping[str, Any], prediction_type: str) -> Mapping[str, Any]:
        """The base models predict epsilon, and were made for 512 pixels."""
        if config["sample_size"] == 96 and prediction_type == "epsilon":
            return {**config, "sample_size": 64}
        return config


SD2 = SD2Architecture()
