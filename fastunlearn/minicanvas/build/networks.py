"""The networks of the embedded model: SDXL's architecture with a few million parameters.

Only constructors; training is in `train_*.py`, the widths are the edition's. Shapes: pictures (B, 3, 64, 64) in
[-1, 1], latents (B, 4, 16, 16), token states (B, 16, W1 + W2) of the two text encoders, pooled state (B, W2);
MiniCanvas has W1 = 32 and W2 = 64.
"""

from __future__ import annotations

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastunlearn.minicanvas.build.editions import CANVAS, Edition, TextShape

TEXT_LENGTH = 16
LATENT_SIZE = 16
TIME_IDS = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)  # original size, crop corner, target size: as SDXL orders them


def new_vae() -> AutoencoderKL:
    """64 x 64 pictures <-> 16 x 16 latents of four channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def _text_config(tokenizer: CLIPTokenizer, shape: TextShape) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=shape.width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # pooling takes the state at this token
        pad_token_id=tokenizer.pad_token_id,
    )


def new_text_encoders(
    tokenizer: CLIPTokenizer, edition: Edition = CANVAS
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The two text encoders; as in SDXL the states before the last layer go to the U-Net."""
    first, second = (_text_config(tokenizer, shape) for shape in edition.text)
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def new_unet(edition: Edition = CANVAS) -> UNet2DConditionModel:
    """Cross-attention in the two lower levels and the middle, as in SDXL; MiniCanvas has 5.5 M parameters."""
    shape = edition.unet
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=shape.channels,
        layers_per_block=1,
        attention_head_dim=shape.heads,  # the number of heads: diffusers kept the wrong name
        transformer_layers_per_block=shape.transformer_layers,
        cross_attention_dim=edition.text_width,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=edition.pooled + 8 * len(TIME_IDS),
    )


def new_scheduler(edition: Edition = CANVAS) -> DDIMScheduler:
    """SDXL's noise schedule, with what the edition changes: by default epsilon prediction and leading timesteps."""
    settings = dict(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )
    return DDIMScheduler(**settings | dict(edition.scheduler))
