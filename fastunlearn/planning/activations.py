"""How much memory the activations of the U-Net take, found without computing them.

The U-Net is built from its configuration as fake tensors, which have shapes and storages but no contents;
one forward and backward pass runs on them while every storage that is born or dies is counted. Passes of two and three
samples tell what of it grows with the batch; one sample is a case of its own, which some operations need not copy.
Convolution workspaces and the allocator's fragments on a GPU are not seen here.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from fastunlearn.models.architectures.base import architecture_of
from fastunlearn.models.parameter_names import set_trainable, trainable_names

FEW = 3  # samples, up to which a pass is run as it is
NORMS = (functional.group_norm, functional.layer_norm)
PRODUCTS = (functional.linear, functional.conv2d, functional.scaled_dot_product_attention, torch.bmm, torch.baddbmm)


@dataclass(frozen=True)
class Activations:
    """Bytes. ``saved``: kept by the forward pass for the backward pass; ``backward``: the peak of both, without the
    gradients of weights that are done; ``together``: with them, from none at the start; ``forward``: the peak of a pass
    without a gradient."""

    saved: int
    backward: int
    together: int
    forward: int


@dataclass(frozen=True)
class Shape:
    """What the U-Net is called with, and how."""

    size: int
    tokens: int
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    checkpointing: bool = False
    eager: bool = False


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations under it make, for as long as they live."""

    def __init__(self, ignored: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.aside = 0
        self.seen: list[tuple[int, int]] = [(0, 0)]
        """After each storage that was born: all bytes but those put aside, and these."""
        self._known: set[int] = set()
        self._watched: dict[int, weakref.ref] = {}
        for tensor in ignored:
            self._watch(tensor.untyped_storage(), counts=0)

    @property
    def peak(self) -> int:
        """Of all bytes together."""
        return max(sum(point) for point in self.seen)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then look at what it returned."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage, counts: int = 1) -> None:
        """Until the storage is gone: another may then be made at its address."""
        key, size = storage._cdata, storage.nbytes() * counts
        if key in self._known or not storage.nbytes():
            return

        def gone(_: object) -> None:
            self.now -= size
            self._known.discard(key)
            del self._watched[key]

        self._known.add(key)
        self._watched[key] = weakref.ref(storage, gone)
        self.now += size
        self.seen.append((self.now - self.aside, self.aside))


class FlashAttention(torch.autograd.Function):
    """What memory-efficient attention keeps: q, k, v, the output and a logarithm per row; never the (N, N) matrix."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Shapes only."""
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Shapes only."""
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


class AsOnTheGpu(TorchFunctionMode):
    """The meta device has neither fused attention nor autocast: this puts the one in place, and follows CUDA's rules
    for the other (products in bf16, norms in fp32)."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace attention; cast the operands of what autocast knows."""
        kwargs = kwargs or {}
        if self.autocast and func in (*PRODUCTS, *NORMS):
            dtype = torch.bfloat16 if func in PRODUCTS else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(dtype), (args, kwargs))
        if func is functional.scaled_dot_product_attention:
            return FlashAttention.apply(*args[:3])
        return func(*args, **kwargs)


def build_unet(config: dict[str, Any]) -> Any:
    """The U-Net of a ``unet/config.json`` on the meta device: shapes and names, no weights."""
    with torch.device("meta"):
        return architecture_of(config).build_denoiser(config)


@dataclass(frozen=True)
class Pass:
    """What one pass of so many samples saw: ``backward``, (2, events), are the bytes beside gradients, and theirs."""

    saved: int
    backward: np.ndarray
    forward: np.ndarray


def measure(unet_json: str, scope: str, rows: int, shape: Shape) -> Activations:
    """One call of the U-Net of this ``unet/config.json`` with ``rows`` samples, training ``scope``."""
    if rows <= FEW:
        seen = observe(unet_json, scope, rows, shape)
    else:
        two, three = (observe(unet_json, scope, samples, shape) for samples in (2, 3))
        seen = Pass(
            two.saved + (rows - 2) * (three.saved - two.saved),
            two.backward + (rows - 2) * (three.backward - two.backward),
            two.forward + (rows - 2) * (three.forward - two.forward),
        )
    beside, gradients = seen.backward
    return Activations(seen.saved, int(beside.max()), int((beside + gradients).max()), int(seen.forward[0].max()))


@lru_cache(maxsize=64)
def observe(unet_json: str, scope: str, rows: int, shape: Shape) -> Pass:
    """Run the pass; the same operations in the same order for any number of samples."""
    config = json.loads(unet_json)
    unet = build_unet(config).to(shape.dtype).train()
    unet.set_attn_processor(AttnProcessor() if shape.eager else AttnProcessor2_0())
    set_trainable(unet, trainable_names(unet, scope))
    if shape.checkpointing:
        unet.enable_gradient_checkpointing(_checkpoint(shape.autocast))
    inputs = example_inputs(config, rows, shape, "meta")
    weights = list(unet.parameters())
    with AsOnTheGpu(shape.autocast), LiveBytes(weights) as live:
        out = unet(**inputs, return_dict=False)[0]
        saved = live.now
    _put_aside_gradients(weights, live)
    with live:
        out.float().sum().backward()
    del out
    with torch.no_grad(), AsOnTheGpu(shape.autocast), LiveBytes(weights) as alone:
        unet(**inputs, return_dict=False)
    return Pass(saved, np.array(live.seen).T, np.array(alone.seen).T)


def _put_aside_gradients(weights: Sequence[nn.Parameter], live: LiveBytes) -> None:
    def put_aside(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            live.aside += parameter.grad.untyped_storage().nbytes()

    for parameter in weights:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(put_aside)


def example_inputs(config: dict[str, Any], rows: int, shape: Shape, device: str) -> dict[str, Any]:
    """Empty tensors with the shapes that ``Backbone.predict`` calls the U-Net with."""
    architecture = architecture_of(config)
    return architecture.example_inputs(config, rows, shape.size, shape.tokens, shape.dtype, device)


def _checkpoint(autocast: bool) -> Callable[..., Any]:
    """As diffusers does it, with the GPU's rules in force again where the backward pass recomputes."""

    def run(call: Callable[..., Any], *args: Any) -> Any:
        def recomputed(*inputs: Any) -> Any:
            with AsOnTheGpu(autocast):
                return call(*inputs)

        return checkpoint(recomputed, *args, use_reentrant=False)

    return run
