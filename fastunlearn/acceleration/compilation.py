"""Two levers on the U-Net's own modules: the layout of its activations, and regional compilation.

``model.channels_last`` and ``model.compile``. Both are off by default, since neither has a measurement on a GPU yet.
To be applied before the first call, with the trained tensors chosen and every hook and attention processor in place,
and after DeepSpeed has taken the module: it sends the weights to all ranks through views, which only contiguous ones
allow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# A run calls each kind of block as recorded student, as student without a gradient and as teacher, at several batch
# sizes; each is compiled for itself. PyTorch's limit of 8 would end in an error in the middle of the first update.
COMPILED_VARIANTS = 128


def apply_channels_last(unet: nn.Module) -> int:
    """Hand every convolution its input with the channels last in memory; returns how many there are.

    The shape (B, C, H, W) and all results stay the same; only strides change. Frozen 4-D weights are stored that way
    too. Trained ones stay contiguous, because ZeRO flattens them with ``view``: a convolution reorders those on each
    call.
    """
    convolutions = [module for module in unet.modules() if isinstance(module, nn.Conv2d)]
    for convolution in convolutions:
        if not convolution.weight.requires_grad:
            convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
        convolution.register_forward_pre_hook(_channels_last_input)
    return len(convolutions)


def _channels_last_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])


def compile_blocks(unet: Any, backend: str = "inductor") -> int:
    """Compile the repeated transformer blocks, each when it is first called; returns how many there are.

    Blocks of equal shape share one compiled program, since their weights are inputs to it. That is also why the
    teacher, which puts other tensors in place of weights, gets what it asks for. Shapes are static, as in a run.
    The module tree, the names of parameters and what DeepSpeed hooks stay as they are; a deep copy is not compiled.

    Hooks that are added to a block after its first call are not seen.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, COMPILED_VARIANTS)
    unet.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
    return sum(module._compiled_call_impl is not None for module in unet.modules())
