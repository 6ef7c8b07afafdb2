"""A fine-tune of the U-Net's own weights: all of them, or those of its attentions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastunlearn.evaluation.attacks.base import Attack, Edit, Target

if TYPE_CHECKING:
    from torch import nn


class Weights(Attack):
    """Trains some parameters of the U-Net as they are."""

    @abstractmethod
    def names(self, unet: nn.Module) -> Sequence[str]:
        """The names of the trained tensors."""

    @contextmanager
    def edit(self, target: Target) -> Iterator[Edit]:
        """A copy of the weights is kept on the host, and put back."""
        from fastunlearn.models.parameter_names import set_trainable

        unet = target.backbone.unet
        set_trainable(unet, self.names(unet))
        parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        before = [parameter.detach().cpu().clone() for parameter in parameters]
        try:
            yield Edit(parameters, target.embed)
        finally:
            set_trainable(unet, [])
            for parameter, old in zip(parameters, before, strict=True):
                parameter.data.copy_(old)
                parameter.grad = None


class Scopes(Weights):
    """What a training of these scopes would train."""

    def __init__(self, title: str, *scopes: str) -> None:
        self.title, self._scopes = title, scopes

    def names(self, unet: nn.Module) -> Sequence[str]:
        """Of all the scopes."""
        from fastunlearn.models.parameter_names import trainable_names

        return [name for scope in self._scopes for name in trainable_names(unet, scope)]


FULL = Scopes("all weights of the U-Net", "full")
ATTENTION = Scopes("the weights of its self- and cross-attentions", "selfattn", "attn2")
