"""Trainable vectors for some words of a prompt, in the pipeline's own text encoders.

The rows of each text encoder's input embedding that belong to the words' tokens become parameters, for as long as a
block lasts; whatever the pipeline encodes meanwhile, drawings too, uses them. No token is added: a token of the words
is replaced wherever it occurs in a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.models.loading import Pipeline
from fastunlearn.models.pipeline import encode_prompt, text_encoders


@contextmanager
def learned_words(
    pipeline: Pipeline, words: Sequence[str], device: torch.device
) -> Iterator[tuple[list[nn.Parameter], Callable[[str], PromptEmbeds]]]:
    """Yields the vectors to train, one matrix per text encoder, and how a prompt is encoded with a gradient."""
    vectors, hooks = [], []
    for tokenizer, encoder in text_encoders(pipeline):
        layer = encoder.to(device).requires_grad_(False).get_input_embeddings()
        ids = torch.tensor(token_ids(tokenizer, words), device=device)
        vectors.append(nn.Parameter(layer.weight[ids].detach().clone()))
        hooks.append(layer.register_forward_hook(_replacement(ids, vectors[-1])))

    try:
        yield vectors, lambda prompt: encode_prompt(pipeline, prompt, device)
    finally:
        for hook in hooks:
            hook.remove()


def token_ids(tokenizer: Callable, words: Sequence[str]) -> list[int]:
    """The tokens of the words, each once."""
    found = [token for word in words for token in tokenizer(word, add_special_tokens=False).input_ids]
    return list(dict.fromkeys(found))


def _replacement(ids: Tensor, vectors: nn.Parameter) -> Callable:
    def replace(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        same = args[0][..., None] == ids  # (B, L, words' tokens)
        return torch.where(same.any(-1, keepdim=True), vectors[same.int().argmax(-1)], out)

    return replace
