"""An exponential average (EMA) of the student's weights, which can be called like the U-Net: SDD's moving teacher.

A copy of the trained tensors in fp32, moved a little towards the student after every optimizer step, and
put in place for the duration of a call.
It is not for ZeRO-3, where no rank has whole weights to copy.

    mean <- d mean + (1 - d) weights        d the decay
With a warm-up d is at most (1 + n) / (10 + n) in update n = 1, 2, ...: early weights are then forgotten sooner.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """The average of the parameters ``named`` of ``unet``, callable like the U-Net. Never records a gradient.

    It starts from the weights as they are, so build it before the first update.
    """

    def __init__(self, unet: nn.Module, named: Mapping[str, nn.Parameter], decay: float, *, warmup: bool) -> None:
        self._unet = unet
        self._named = dict(named)
        self._decay, self._warmup = decay, warmup
        self.updates = 0
        self.mean = {name: p.detach().float().clone() for name, p in self._named.items()}
        self._called = self._in_dtype_of_the_model()

    @torch.no_grad()
    def __call__(self, *args: Tensor, **kwargs: object) -> tuple[Tensor, ...]:
        """Run the mean weights on the arguments of the U-Net's ``forward``."""
        return torch.func.functional_call(self._unet, self._called, args, kwargs)

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        self.updates += 1
        early = (1 + self.updates) / (10 + self.updates)
        decay = min(self._decay, early) if self._warmup else self._decay
        for name, parameter in self._named.items():
            self.mean[name].lerp_(parameter.detach().float(), 1.0 - decay)  # exact where nothing has changed
        self._called = self._in_dtype_of_the_model()

    def export(self) -> dict[str, Tensor]:
        """The mean in fp32 on the host."""
        return {name: mean.cpu().clone().contiguous() for name, mean in self.mean.items()}

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {"updates": self.updates, "mean": {name: mean.cpu() for name, mean in self.mean.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint."""
        self.updates = state["updates"]
        for name, mean in self.mean.items():
            mean.copy_(state["mean"][name])
        self._called = self._in_dtype_of_the_model()

    def _in_dtype_of_the_model(self) -> dict[str, Tensor]:
        """What calls use: the very tensors of an fp32 model, else a cast that lasts until the next update."""
        return {name: self.mean[name].to(parameter.dtype) for name, parameter in self._named.items()}
