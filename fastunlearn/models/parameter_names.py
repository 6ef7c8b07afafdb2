"""What the names of a denoiser's parameters say: which a scope trains, which block and which layer they belong to.

The names are those of its architecture (``architectures/``). Importable without torch: the checks of the disk count
what a scope trains from the headers of files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from fastunlearn.models.architectures.base import architecture_of
from fastunlearn.registry import ARCHITECTURES
from fastunlearn.schema.fields import Scope

if TYPE_CHECKING:
    from torch import Tensor, nn

SCOPES: tuple[str, ...] = get_args(Scope)
KEYS_AND_VALUES: Scope = "attn2_kv"  # of the text
# bitsandbytes keeps the state of tensors below this size in 32 bits. ZeRO flattens a whole group into one tensor, so
# norms and biases need a group of their own to keep that protection.
SMALL_TENSOR_NUMEL = 4096


def is_small(numel: int) -> bool:
    """Whether a tensor of this size is a norm or a bias, and its moments stay in 32 bits."""
    return numel < SMALL_TENSOR_NUMEL


def block_of(name: str) -> str:
    """The block of the denoiser that a parameter belongs to, such as ``down_blocks.1.attentions.0``."""
    found = (architecture.block_of(name) for architecture in ARCHITECTURES.values())
    return next(filter(None, found), name.partition(".")[0])


def layer_of(name: str, numel: int) -> str:
    """What the fused engine steps together with a parameter: the matrices of a transformer block or a ResNet block,
    whose gradients arrive one after the other; and all small tensors of the model, for the sake of few launches."""
    if is_small(numel):
        return "small"
    found = (architecture.layer_of(name) for architecture in ARCHITECTURES.values())
    return next(filter(None, found), name.partition(".")[0])


def trainable_names(unet: nn.Module, scope: str) -> list[str]:
    """Names of the parameters that a scope trains, in module order.

    "attn2": Linear layers of the cross-attentions. "attn2_kv": only their K and V. "selfattn": Linear layers of the
    self-attentions. "attn": of both. "noxattn_all": every Linear and Conv outside the cross-attentions. "noxattn":
    these but for the first and last convolution and the embeddings of timestep and size. "full": every parameter.

    Raises:
        ValueError: unknown scope.
    """
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}, expected one of {', '.join(SCOPES)}")
    if scope == "full":
        return [name for name, _ in unet.named_parameters()]
    in_scope = architecture_of(_config(unet)).in_scope
    return [
        f"{module_name}.{name}"
        for module_name, module in _matrices(unet)
        if in_scope(module_name, scope)
        for name, _ in module.named_parameters(recurse=False)
    ]


def count_trained(shapes: Mapping[str, Sequence[int]], scope: str, config: Mapping[str, Any]) -> int:
    """How many numbers a scope trains, from names and shapes of a denoiser's tensors, in diffusers' layout or in that
    of single files; ``config``: its configuration."""
    if scope == "full":
        return sum(math.prod(shape) for shape in shapes.values())
    in_scope = architecture_of(config).in_scope
    owners = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1}
    counted = ((name.rpartition(".")[0], math.prod(shape)) for name, shape in shapes.items())
    return sum(numel for owner, numel in counted if owner in owners and in_scope(owner, scope))


def text_projections(unet: nn.Module) -> list[Any]:
    """The projections of the text to keys and values, in module order."""
    in_scope = architecture_of(_config(unet)).in_scope
    return [module for name, module in _matrices(unet) if in_scope(name, KEYS_AND_VALUES)]


def attention_projections(unet: nn.Module) -> list[nn.Module]:
    """Queries, keys, values and outputs of all attentions, in module order."""
    is_projection = architecture_of(_config(unet)).is_attention_projection
    return [module for name, module in _matrices(unet) if is_projection(name)]


def _config(unet: nn.Module) -> Mapping[str, Any]:
    return getattr(unet, "config", {})


def _matrices(unet: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    from torch import nn

    return ((name, module) for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))


def set_trainable(unet: nn.Module, names: Sequence[str]) -> None:
    """Let exactly these parameters require a gradient."""
    wanted = set(names)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in wanted)


def trained_tensors(unet: nn.Module) -> dict[str, Tensor]:
    """The parameters that require a gradient, as they are now: a later cast of ``unet`` gives it other memory."""
    return {name: parameter.detach() for name, parameter in unet.named_parameters() if parameter.requires_grad}
