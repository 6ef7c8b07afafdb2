"""Loading, prompt embeddings and scopes, on the public architectures without their weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import POOLED_WIDTH, TEXT_WIDTH, TOKENS, tiny_unet

from fastunlearn.errors import UserError
from fastunlearn.minicanvas import pipeline_path
from fastunlearn.models.backbone import compute_in
from fastunlearn.models.loading import load_pipeline
from fastunlearn.models.parameter_names import set_trainable, trainable_names
from fastunlearn.models.pipeline import encode_prompts

SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD15 = {"sample_size": 64, "cross_attention_dim": 768}
# scope -> (tensors, parameters)
SDXL_SCOPES = {
    "full": (1680, 2_567_463_684),
    "attn2": (350, 545_670_400),
    "attn2_kv": (140, 340_787_200),
    "attn": (700, 955_353_600),
    "noxattn": (772, 1_996_259_200),  # as ESD's code for SDXL: 24.9 M fewer than all
    "noxattn_all": (818, 2_021_205_124),
}
SD15_SCOPES = {
    "full": (686, 859_520_964),
    "attn2": (80, 43_962_560),
    "attn2_kv": (32, 19_169_280),
    "attn": (160, 93_536_640),
    "noxattn": (336, 787_459_200),
    "noxattn_all": (388, 815_358_084),
}


@pytest.mark.parametrize(("architecture", "scopes"), [(SDXL, SDXL_SCOPES), (SD15, SD15_SCOPES)], ids=["sdxl", "sd15"])
def test_scopes_hold_the_published_tensors(architecture: dict, scopes: dict[str, tuple[int, int]]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**architecture)
    sizes = {name: p.numel() for name, p in unet.named_parameters()}
    for scope, expected in scopes.items():
        names = trainable_names(unet, scope)
        assert (len(names), sum(sizes[name] for name in names)) == expected
    with pytest.raises(ValueError, match="unknown scope"):
        trainable_names(unet, "attn3")


@pytest.mark.parametrize("architecture", [SDXL, SD15], ids=["sdxl", "sd15"])
def test_noxattn_leaves_both_ends_and_the_embeddings_of_timestep_and_size_alone(architecture: dict) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**architecture)
    left = set(trainable_names(unet, "noxattn_all")) - set(trainable_names(unet, "noxattn"))
    known = ("conv_in", "conv_out", "time_embedding", "time_emb_proj", "add_embedding")
    found = {part for name in left for part in name.split(".") if part in known}
    assert found == set(known if architecture is SDXL else known[:4])
    assert all(any(part in known for part in name.split(".")) for name in left)


def test_only_the_scope_requires_a_gradient() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    names = trainable_names(unet, "attn2_kv")
    set_trainable(unet, names)
    assert [name for name, p in unet.named_parameters() if p.requires_grad] == names


def test_a_unet_that_computes_in_bf16_takes_and_gives_fp32() -> None:
    unet, plain = tiny_unet(), tiny_unet().to(torch.bfloat16)
    compute_in(unet, torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, TOKENS, TEXT_WIDTH, generator=draw)
    added = {"text_embeds": torch.randn(2, POOLED_WIDTH, generator=draw), "time_ids": torch.ones(2, 6)}
    times = torch.tensor([3, 700])
    with torch.no_grad():
        (got,) = unet(x, times, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)
        half = {name: tensor.bfloat16() for name, tensor in added.items()}
        (expected,) = plain(
            x.bfloat16(), times, encoder_hidden_states=text.bfloat16(), added_cond_kwargs=half, return_dict=False
        )
    assert got.dtype == torch.float32 and {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    assert torch.equal(got, expected.float())


def test_the_empty_prompt_follows_the_pipeline() -> None:
    pipeline = load_pipeline("minicanvas")
    embeds = encode_prompts(pipeline, ["", "cat"])
    assert embeds.hidden[0].abs().max() == 0 and embeds.pooled is not None and embeds.pooled[0].abs().max() == 0
    assert embeds.hidden[1].abs().max() > 0
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert encode_prompts(pipeline, [""]).hidden.abs().max() > 0


def test_other_pipelines_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pipeline_path(), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionXLImg2ImgPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="StableDiffusionXLImg2ImgPipeline"):
        load_pipeline(folder)
    with pytest.raises(UserError, match=r"has no model_index.json"):
        load_pipeline(tmp_path / "nothing")
