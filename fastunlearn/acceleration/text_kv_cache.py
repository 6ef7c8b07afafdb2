"""Keys and values of the run's prompts, computed once for weights that do not change.

A table per cross-attention, one entry for each prompt, from which calls without a gradient take theirs instead of
projecting the same embeddings again: those of the frozen model, and those of the student where its key and value
projections are not trained.

Calls with a gradient cannot use it, since they recompute parts of themselves when other prompts may be at hand; nor can
embeddings with noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fastunlearn.acceleration.attention import PROMPT_KEYS
from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds


def cross_attentions(unet: nn.Module) -> list[Attention]:
    """The layers that project text."""
    return [module for module in unet.modules() if isinstance(module, Attention) and module.is_cross_attention]


class PromptKeys:
    """The tables of one U-Net, made from the weights that it has now."""

    @torch.no_grad()
    def __init__(self, unet: nn.Module, embeds: PromptEmbeds, autocast: bool) -> None:
        """``embeds``: all prompts, numbered."""
        self._layers = cross_attentions(unet)
        with torch.autocast(embeds.hidden.device.type, torch.bfloat16, enabled=autocast):
            self._tables = [(layer.to_k(embeds.hidden), layer.to_v(embeds.hidden)) for layer in self._layers]

    @property
    def nbytes(self) -> int:
        """Of all tables."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._tables)

    @contextmanager
    def installed(self, rows: Tensor | None) -> Iterator[None]:
        """Inside, a call with these prompts reads the tables; without rows nothing changes."""
        if rows is not None:
            for layer, (keys, values) in zip(self._layers, self._tables, strict=True):
                setattr(layer, PROMPT_KEYS, (keys[rows], values[rows]))
        try:
            yield
        finally:
            for layer in self._layers if rows is not None else ():
                delattr(layer, PROMPT_KEYS)
