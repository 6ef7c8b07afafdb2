"""Which attention implementation the U-Net uses. The only file that knows xformers and FlashAttention-3.

One processor for diffusers' ``Attention`` layers in SD and SDXL, the kernels that it can call, and the function that
installs it and says what was chosen. diffusers' own switch, ``set_attention_backend``, has no effect on these U-Nets.
Which machine has which kernel is in ``schema/attention_rules.py``. ``auto`` may fall back; an explicit request that
cannot be met is an error.

Shapes: B batch, N queries, M keys, H heads, D width of a head. Projections are taken apart by views, never by copies.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.attention as torch_attention
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastunlearn.errors import UserError, nearest
from fastunlearn.models.parameter_names import text_projections
from fastunlearn.schema.attention_rules import CHOICES, Capability, attention_refusal
from fastunlearn.utils.dtypes import SHORT_NAMES
from fastunlearn.utils.text import first_line

# (query_BNHD, key_BMHD, value_BMHD, mask or None, scale or None for 1 / sqrt(D)) -> output_BNHD
Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]

PINNED = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
WITHOUT_CUDNN = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
PROMPT_KEYS = "prompt_keys"  # attribute of a layer that takes keys and values from a table in this call
FLASH3 = "FA3"  # PyTorch's name for it


@dataclass(frozen=True)
class Sdpa:
    """PyTorch's attention, limited to some of its backends; None: all that PyTorch has."""

    backends: tuple[SDPBackend, ...] | None = None
    masked: tuple[SDPBackend, ...] | None = None
    """The limit for a call with a mask; empty: such a call is refused."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Attend. PyTorch wants the heads before the tokens: that is a view, there and back."""
        backends = self.backends if mask is None else self.masked
        if mask is not None and backends == ():
            raise _mask_refused("the pinned backend")
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        with contextlib.nullcontext() if backends is None else sdpa_kernel(list(backends)):
            out_BHND = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return out_BHND.transpose(1, 2)


class TokensFirst:
    """An attention that takes and returns [B, N, H, D] itself, and is called without a mask."""

    def __init__(self, name: str, function: Callable[..., Any], scale_argument: str) -> None:
        self.name, self._function, self._scale_argument = name, function, scale_argument

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Attend on the projections as they are in memory."""
        if mask is not None:
            raise _mask_refused(repr(self.name))
        out = self._function(query, key, value, **{self._scale_argument: scale})
        return out[0] if isinstance(out, tuple) else out  # some versions return the logarithms of the rows as well


def _mask_refused(name: str) -> UserError:
    return UserError(
        f"model.attention: {name} is called without a mask, and this model passes one; use 'auto', 'sdpa' or 'eager'"
    )


class UNetAttention:
    """The processor: what diffusers' ``AttnProcessor2_0`` does for the U-Nets of SD and SDXL, with a kernel of choice.

    ``upcast_attention`` and ``upcast_softmax`` ask for scores in fp32. These kernels keep them in fp32 anyway, so there
    is nothing to do; ``eager`` follows them.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """One attention layer, on tokens (B, N, C) or a picture (B, C, H, W)."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if residual.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        given = getattr(attn, PROMPT_KEYS, None)
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1))
            for projected in (attn.to_q(hidden_states), *(given or (attn.to_k(context), attn.to_v(context))))
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        mask = attention_mask
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, context.shape[1], len(context))
            mask = mask.view(len(context), attn.heads, -1, mask.shape[-1])
        out_BNHD = self.kernel(query, key, value, mask, None if attn.scale_qk else 1.0)

        tokens = out_BNHD.flatten(2).to(query.dtype)
        for layer in attn.to_out:  # projection, dropout
            tokens = layer(tokens)
        if residual.ndim == 4:
            tokens = tokens.transpose(-1, -2).reshape(residual.shape)
        if attn.residual_connection:
            tokens = tokens + residual
        return tokens / attn.rescale_output_factor


def check_attention(choice: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse an explicit choice that this device, generation or dtype rules out. Needs no model.

    Raises:
        UserError: with the reason and the remedy.
    """
    if choice not in CHOICES:
        raise UserError(
            f"model.attention: {choice!r} is unknown; allowed are {', '.join(CHOICES)}" + nearest(choice, CHOICES)
        )
    refusal = attention_refusal(choice, device.type, SHORT_NAMES.get(dtype, str(dtype)), _capability(device))
    if refusal is not None:
        raise UserError(refusal)


def install_attention(
    unet: Any,
    choice: str,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Install the processors for ``choice`` (one of ``CHOICES``) and return a line for the log.

    An explicit choice is tried once, forward and backward, in each head width of this U-Net: what PyTorch or a package
    refuses, it refuses here and not in the first update.

    Args:
        unet: a diffusers model whose attentions are its ``Attention`` layers.
        device: where the U-Net will run; None: where it is.
        dtype: in which it will compute, autocast included; None: that of its weights.

    Raises:
        UserError: an explicit choice cannot be met.
    """
    device = unet.device if device is None else device
    dtype = unet.dtype if dtype is None else dtype
    check_attention(choice, device, dtype)
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    if any(layer.added_kv_proj_dim is not None for layer in layers):
        raise UserError("model.attention: this U-Net attends to added keys and values; those of SD and SDXL do not")
    if choice == "eager":
        unet.set_attn_processor(AttnProcessor())
        return "attention: eager (matrix products and softmax, for comparison)"
    kernel, line = build_kernel(choice, device)
    if choice not in ("auto", "sdpa"):
        _try_out(kernel, choice, {layer.inner_dim // layer.heads for layer in layers}, device, dtype)
    unet.set_attn_processor(UNetAttention(kernel))
    return line


def build_kernel(choice: str, device: torch.device) -> tuple[Kernel, str]:
    """The kernel for ``choice`` on ``device``, and the line for the log.

    Raises:
        UserError: its package cannot be loaded.
    """
    if choice == "flash3":
        return _flash3()
    _restore_flash()
    if choice == "xformers":
        return _xformers(), "attention: xformers"
    if choice in PINNED:
        masked = (PINNED[choice],) if choice in ("sdpa-efficient", "sdpa-math") else ()
        return Sdpa((PINNED[choice],), masked), f"attention: {choice}"
    if choice == "sdpa":
        return Sdpa(), "attention: sdpa, PyTorch's choice of backend"
    return _auto(device, _capability(device))


def _auto(device: torch.device, capability: Capability | None) -> tuple[Kernel, str]:
    """PyTorch's own choice of backend, without those that are known to compute wrongly.

    cuDNN's backward gives NaN for some lengths with a mask (pytorch#196678), and its results are silently wrong on
    B200 for few heads (pytorch#193893). No measurement of ours puts another backend before PyTorch's order.
    """
    line = "attention: sdpa, PyTorch's choice of {} (auto: {})"
    if capability is None:
        if device.type == "cpu":
            return Sdpa(), line.format("flash and math", "no GPU")
        return Sdpa(), line.format("backend", device.type)
    generation = f"sm_{capability[0]}{capability[1]}"
    if capability[0] == 10:
        reason = f"cuDNN can be wrong on {generation}"
        return Sdpa(WITHOUT_CUDNN, WITHOUT_CUDNN), line.format("flash, efficient and math", reason)
    return Sdpa(None, WITHOUT_CUDNN), line.format("cudnn, flash, efficient and math", generation)


def _xformers() -> Kernel:
    try:
        import xformers.ops
    except (ImportError, OSError) as error:
        raise UserError(
            f"model.attention: 'xformers' cannot be loaded ({first_line(error)}); "
            "install the 'gpu' extra again, or use 'auto'"
        ) from error
    return TokensFirst("xformers", xformers.ops.memory_efficient_attention, "scale")


def _flash3() -> tuple[Kernel, str]:
    """FlashAttention-3 behind PyTorch's own operator where this PyTorch can put it there, else called directly."""
    implementations: Callable[[], list[str]] = getattr(torch_attention, "list_flash_attention_impls", list)
    try:
        if FLASH3 in implementations():
            torch_attention.activate_flash_attention_impl(FLASH3)
            return Sdpa((SDPBackend.FLASH_ATTENTION,), ()), "attention: flash3, behind PyTorch's flash backend"
        interface = importlib.import_module("flash_attn_interface")
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"model.attention: 'flash3' cannot be loaded ({first_line(error)}); use 'auto'") from error
    kernel = TokensFirst("flash3", interface.flash_attn_func, "softmax_scale")
    return kernel, "attention: flash3, from flash_attn_interface"


def _restore_flash() -> None:
    """FlashAttention-3 replaces PyTorch's flash kernels in the whole process: another choice means the usual ones."""
    current = getattr(torch_attention, "current_flash_attention_impl", None)
    if current is not None and current() == FLASH3:
        torch_attention.restore_flash_attention_impl()


def _try_out(kernel: Kernel, choice: str, widths: Collection[int], device: torch.device, dtype: torch.dtype) -> None:
    """One small forward and backward pass per head width, with as many keys as a prompt has tokens."""
    for width in sorted(widths):
        query, key, value = (
            torch.zeros(1, length, 2, width, device=device, dtype=dtype, requires_grad=True) for length in (64, 77, 77)
        )
        try:
            with torch.enable_grad():
                kernel(query, key, value, None, None).sum().backward()
        except (RuntimeError, ValueError) as error:
            short = SHORT_NAMES.get(dtype, str(dtype))
            raise UserError(
                f"model.attention: {choice!r} cannot run heads of width {width} in {short} on this {device.type} "
                f"({first_line(error)}); use 'auto' or 'sdpa'"
            ) from error


def _capability(device: torch.device) -> Capability | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def stop_first_token_gradient(unet: nn.Module) -> int:
    """Let no gradient pass through the keys and values of the first token in any cross-attention; returns their number.

    The first token of CLIP's prompts is the same for every prompt, and what it says serves all of them.
    """
    layers = text_projections(unet)
    for layer in layers:
        layer.register_forward_hook(_detach_first)
    return len(layers)


def _detach_first(_: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)
