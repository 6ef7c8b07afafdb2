"""Tensors of a diffusers folder under the names of the original layout, as one ``.safetensors`` file has them.

For each tensor of the original layout: its name, its shape and how it is made of diffusers' tensors. Reading that
layout is diffusers' work (``models/loading.py``), writing it that of ``random_weights.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastunlearn.models.architectures.base import PublicModel

Shape = tuple[int, ...]

RESNET = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.", "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection.",
}  # fmt: skip
UNET_ENDS = {
    "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.", "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}  # fmt: skip
VAE_ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}
OPEN_CLIP = {
    "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}  # fmt: skip
OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}


@dataclass(frozen=True)
class Original:
    """One tensor of the original layout: ``make`` of the tensors ``sources`` of one component."""

    name: str
    shape: Shape
    component: str
    sources: tuple[str, ...]
    make: Callable[[list[Tensor]], Tensor]


def original_tensors(model: PublicModel, shapes: Mapping[str, Mapping[str, Shape]]) -> Iterator[Original]:
    """All tensors of a whole model. ``shapes``: of each component, diffusers' names and shapes."""
    for name, shape in shapes["unet"].items():
        yield _same("model.diffusion_model." + unet_name(name, model), shape, "unet", name)
    levels = len(model.vae["block_out_channels"])
    for name, shape in shapes["vae"].items():
        new = "first_stage_model." + vae_name(name, levels)
        if ".attentions." in name and len(shape) == 2:  # the original's are convolutions over single points
            yield Original(new, (*shape, 1, 1), "vae", (name,), lambda parts: parts[0][:, :, None, None])
        else:
            yield _same(new, shape, "vae", name)
    for encoder in model.adapter.text_encoders:
        if encoder.open_clip:
            yield from _open_clip(encoder.prefix, encoder.name, shapes[encoder.name])
        else:
            for name, shape in shapes[encoder.name].items():
                yield _same(encoder.prefix + name, shape, encoder.name, name)


def _same(new: str, shape: Shape, component: str, name: str) -> Original:
    return Original(new, shape, component, (name,), lambda parts: parts[0])


def _renamed(name: str, table: Mapping[str, str]) -> str:
    found = next((old for old in table if name.startswith(old)), None)
    return name if found is None else table[found] + name.removeprefix(found)


def unet_name(name: str, model: PublicModel) -> str:
    """Blocks are counted through: each level has its layers and what goes to the next level."""
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    if match is None:
        new = _renamed(name, UNET_ENDS)
        resnet = re.fullmatch(r"(middle_block\.[02]\.)(.*)", new)
        return new if resnet is None else resnet[1] + _renamed(resnet[2], RESNET)
    way, level, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    per_level = model.unet["layers_per_block"] + 1
    if kind == "downsamplers":
        return f"input_blocks.{per_level * (level + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        attends = "CrossAttn" in model.unet["up_block_types"][level]
        return f"output_blocks.{per_level * (level + 1) - 1}.{2 if attends else 1}.{rest}"
    number = per_level * level + layer
    block = f"input_blocks.{number + 1}" if way == "down" else f"output_blocks.{number}"
    return f"{block}.1.{rest}" if kind == "attentions" else f"{block}.0.{_renamed(rest, RESNET)}"


def vae_name(name: str, levels: int) -> str:
    """The decoder's levels are counted from fine to coarse, unlike diffusers'."""
    half, _, rest = name.partition(".")
    if half not in ("encoder", "decoder"):
        return name
    rest = rest.replace("conv_norm_out.", "norm_out.").replace("conv_shortcut.", "nin_shortcut.")
    if (middle := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.*)", rest)) is not None:
        return f"{half}.mid.block_{int(middle[1]) + 1}.{middle[2]}"
    if (attention := re.fullmatch(r"mid_block\.attentions\.0\.(.*)", rest)) is not None:
        return f"{half}.mid.attn_1.{_renamed(attention[1], VAE_ATTENTION)}"
    if (block := re.fullmatch(r"(down|up)_blocks\.(\d)\.(.*)", rest)) is not None:
        way, level = block[1], int(block[2]) if half == "encoder" else levels - 1 - int(block[2])
        inner = re.sub(r"^resnets\.", "block.", block[3]).replace(f"{way}samplers.0.", f"{way}sample.")
        return f"{half}.{way}.{level}.{inner}"
    return f"{half}.{rest}"


def _open_clip(prefix: str, component: str, shapes: Mapping[str, Shape]) -> Iterator[Original]:
    """OpenCLIP keeps queries, keys and values in one matrix, and the projection the other way round."""
    for name, shape in shapes.items():
        if name == "text_projection.weight":
            yield Original(
                prefix + "text_projection", shape[::-1], component, (name,), lambda parts: parts[0].T.contiguous()
            )
            continue
        if name in OPEN_CLIP_ENDS:
            yield _same(prefix + OPEN_CLIP_ENDS[name], shape, component, name)
            continue
        layer, inner = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
        start = f"{prefix}transformer.resblocks.{layer}."
        if (third := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", inner)) is None:
            yield _same(start + _renamed(inner, OPEN_CLIP), shape, component, name)
        elif third[1] == "q":
            sources = tuple(name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv")
            joined = (3 * shape[0], *shape[1:])
            yield Original(f"{start}attn.in_proj_{third[2]}", joined, component, sources, torch.cat)
