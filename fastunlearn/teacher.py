"""Predictions of the frozen model, without a second U-Net.

What this is: a copy of the tensors that training changes, put in place for the duration of a call.
What this is not: an EMA or any other moving teacher. ZeRO-3 shards the student's parameters, so there, and only there,
the teacher is a whole second module.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Teacher:
    """The frozen original of a U-Net, callable like the U-Net itself. Never records a gradient.

    Build it before the first update, and before DeepSpeed touches the module.
    """

    def __init__(self, unet: nn.Module, trained: Sequence[str], *, whole_copy: bool) -> None:
        self._module = copy.deepcopy(unet).requires_grad_(False) if whole_copy else unet
        self._swap = not whole_copy
        parameters = dict(unet.named_parameters())
        self.frozen = {name: parameters[name].detach().clone() for name in trained} if self._swap else {}

    @torch.no_grad()
    def __call__(self, *args: Tensor, **kwargs: object) -> tuple[Tensor, ...]:
        """Run the original weights on the arguments of ``UNet2DConditionModel.forward``."""
        if not self._swap:
            return self._module(*args, **kwargs)
        return torch.func.functional_call(self._module, self.frozen, args, kwargs)
