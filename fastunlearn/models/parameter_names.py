"""What the names of a U-Net's parameters say: which a scope trains, which block and which layer they belong to.

The names are those of diffusers' ``UNet2DConditionModel``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import get_args

from torch import Tensor, nn

from fastunlearn.schema.fields import Scope

BLOCK_NAME = re.compile(r"((?:down|up)_blocks\.\d+\.[a-z]+\.\d+|mid_block\.[a-z]+\.\d+)")
LAYER_NAME = re.compile(r"(?:(?:down|up)_blocks\.\d+|mid_block)\.[a-z]+\.\d+(?:\.transformer_blocks\.\d+)?")
# bitsandbytes keeps the state of tensors below this size in 32 bits. ZeRO flattens a whole group into one tensor, so
# norms and biases need a group of their own to keep that protection.
SMALL_TENSOR_NUMEL = 4096


def is_small(numel: int) -> bool:
    """Whether a tensor of this size is a norm or a bias, and its moments stay in 32 bits."""
    return numel < SMALL_TENSOR_NUMEL


def block_of(name: str) -> str:
    """The block of the U-Net that a parameter belongs to, such as ``down_blocks.1.attentions.0``."""
    found = BLOCK_NAME.match(name)
    return found[1] if found else name.partition(".")[0]


def layer_of(name: str, numel: int) -> str:
    """What the fused engine steps together with a parameter: the matrices of a transformer block or a ResNet block,
    whose gradients arrive one after the other; and all small tensors of the model, for the sake of few launches."""
    if is_small(numel):
        return "small"
    found = LAYER_NAME.match(name)
    return found[0] if found else name.partition(".")[0]


SCOPES: tuple[str, ...] = get_args(Scope)


def trainable_names(unet: nn.Module, scope: str) -> list[str]:
    """Names of the parameters that a scope trains, in module order.

    "attn2": Linear layers of the cross-attentions. "attn2_kv": only their K and V. "noxattn": every Linear and Conv
    outside the cross-attentions. "selfattn": Linear layers of the self-attentions. "full": every parameter.

    Raises:
        ValueError: unknown scope.
    """
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}, expected one of {', '.join(SCOPES)}")
    if scope == "full":
        return [name for name, _ in unet.named_parameters()]
    names = []
    for module_name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and _in_scope(module_name, scope):
            names += [f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)]
    return names


def _in_scope(module_name: str, scope: str) -> bool:
    parts = module_name.split(".")
    if scope == "noxattn":
        return "attn2" not in parts
    if scope == "selfattn":
        return "attn1" in parts
    return "attn2" in parts and (scope == "attn2" or parts[-1] in ("to_k", "to_v"))


def set_trainable(unet: nn.Module, names: Sequence[str]) -> None:
    """Let exactly these parameters require a gradient."""
    wanted = set(names)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in wanted)


def trained_tensors(unet: nn.Module) -> dict[str, Tensor]:
    """The parameters that require a gradient, as they are now: a later cast of ``unet`` gives it other memory."""
    return {name: parameter.detach() for name, parameter in unet.named_parameters() if parameter.requires_grad}
