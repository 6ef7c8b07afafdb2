"""Which attention implementation the U-Net uses. The only file that knows xformers.

What this is: one function that installs attention processors on a diffusers U-Net and says which one it chose.
What this is not: a new attention kernel. ``auto`` may fall back; an explicit request that cannot be met is an error.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from fastunlearn.errors import UserError


def install_attention(unet: UNet2DConditionModel, choice: str) -> str:
    """Install the processors for ``choice`` ("auto", "sdpa", "xformers" or "eager") and return a line for the log.

    SDXL's blocks ignore diffusers' ``set_attention_backend``, so the processors themselves are replaced.

    Raises:
        UserError: xformers was asked for where it cannot run.
    """
    if choice == "eager":
        unet.set_attn_processor(AttnProcessor())
        return "attention: eager (matrix products and softmax, for comparison)"
    if choice == "xformers":
        _install_xformers(unet)
        return "attention: xformers"
    unet.set_attn_processor(AttnProcessor2_0())
    return "attention: sdpa" + (" (auto)" if choice == "auto" else "")


def _install_xformers(unet: UNet2DConditionModel) -> None:
    if not torch.cuda.is_available():
        raise UserError("model.attention: xformers needs a CUDA GPU, and none was found; use 'auto' or 'sdpa'")
    try:
        unet.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError) as error:
        raise UserError(
            "model.attention: xformers is not installed; install the 'gpu' extra, or use 'auto' or 'sdpa'"
        ) from error


def stop_first_token_gradient(unet: nn.Module) -> int:
    """Let no gradient pass through the keys and values of the first token in any cross-attention; returns their number.

    The first token of CLIP's prompts is the same for every prompt, and what it says serves all of them.
    """
    layers = [module for name, module in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    for layer in layers:
        layer.register_forward_hook(_detach_first)
    return len(layers)


def _detach_first(_: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)
