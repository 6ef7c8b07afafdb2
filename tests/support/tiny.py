"""The smallest parts with SDXL's structure, shared by the tests of training. Not a test itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from fastunlearn.config import Concept, PromptsConfig
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.models.architectures.sdxl import SDXL
from fastunlearn.models.backbone import Backbone
from fastunlearn.models.noise_process import NoiseProcess
from fastunlearn.prompts.variants import PromptTable, build_prompt_table
from fastunlearn.sampling.batch import BatchLayout
from fastunlearn.sampling.rollout import Rollout

TEXT_WIDTH, POOLED_WIDTH, TOKENS = 16, 8, 5


def flat(weights: Mapping[str, Tensor]) -> Tensor:
    """All weights as one fp64 vector, in the order of their names."""
    return torch.cat([weights[name].detach().double().flatten() for name in sorted(weights)])


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    """About 45,000 parameters, with text_time conditioning and cross-attention as in SDXL."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1), attention_head_dim=(1, 2), cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=POOLED_WIDTH + 24, norm_num_groups=4,
    )  # fmt: skip


def tiny_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """SDXL's noise schedule under DDIM."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="leading", prediction_type=prediction_type,
    )  # fmt: skip


def tiny_prompts(names: list[str] | None = None, **prompts: object) -> PromptTable:
    concepts = [Concept(name=name) for name in names or ["neon style"]]
    return build_prompt_table(concepts, PromptsConfig.model_validate({"templates": ["{concept}"]} | prompts), seed=0)


def tiny_backbone(
    prompt_table: PromptTable, prediction_type: str = "epsilon", unet: object = None, *, autocast: bool = False
) -> Backbone:
    """Random prompt embeddings, one per text of the table."""
    draw = torch.Generator().manual_seed(7)
    hidden = torch.randn(len(prompt_table.texts), TOKENS, TEXT_WIDTH, generator=draw)
    pooled = torch.randn(len(prompt_table.texts), POOLED_WIDTH, generator=draw)
    return Backbone(
        unet=tiny_unet() if unet is None else unet,
        architecture=SDXL,
        noise=NoiseProcess(tiny_scheduler(prediction_type), torch.device("cpu")),
        embeds=PromptEmbeds(hidden, pooled).numbered(),
        sample_shape=(4, 8, 8),
        fixed_inputs={"time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])},
        autocast=autocast,
    )


def tiny_rollout(
    models: Predictors, prompt_table: PromptTable, layout: BatchLayout | None = None, steps: int = 50
) -> Rollout:
    layout = layout or BatchLayout(rank=0, world_size=1, batch=1, micro_batches=1)
    return Rollout(models, prompt_table, layout, steps=steps, guidance_scale=3.0, seed=42)
