"""A closed-form edit of a loaded model: from prompts to tokens, and from tokens to new keys and values.

The one step in which UCE and RECE change a U-Net. It needs no engine, no optimizer and no trajectory, and may come
before a training that starts from what it leaves. The algebra is in ``closed_form.py``, the settings are in
``methods/uce.py`` and ``methods/rece.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fastunlearn.config import Config
from fastunlearn.config.base import named_concepts
from fastunlearn.config.run_prompts import preserve_prompts
from fastunlearn.methods.parts.closed_form import Tokens, edit_weights
from fastunlearn.models.loading import Pipeline
from fastunlearn.models.parameter_names import KEYS_AND_VALUES, trainable_names
from fastunlearn.models.pipeline import encode_prompts, encoders_on, text_encoders
from fastunlearn.prompts.variants import PromptPair, PromptTable, build_prompt_table


class ClosedForm(Protocol):
    """A method that edits in closed form."""

    def text_map(self, tokens: Tokens, projections: Mapping[str, Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Text:
    """Encoded prompts: ``hidden`` (L, D) in fp64 and the position of the last word, by prompt."""

    hidden: Mapping[str, Tensor]
    last_word: Mapping[str, int]

    def of_pair(self, variant: PromptPair, which: str) -> tuple[Tensor, Tensor]:
        """The tokens of a prompt with the concept that enter, and of the prompt that takes its place, aligned."""
        with_it, without = self.hidden[variant.prompt], self.hidden[variant.anchor]
        if which == "all":
            return with_it, without
        first, second = self.last_word[variant.prompt], self.last_word[variant.anchor]
        count = 1 if which == "last" else len(with_it) - max(first, second)
        return with_it[first : first + count], without[second : second + count]

    def of_kept(self, prompt: str, which: str) -> Tensor:
        """The tokens that enter of a prompt that is to be preserved."""
        hidden, last = self.hidden[prompt], self.last_word[prompt]
        return {"all": hidden, "last": hidden[last : last + 1], "tail": hidden[last:]}[which]


def edit_pipeline(cfg: Config, method: ClosedForm, pipeline: Pipeline, device: torch.device) -> dict[str, Tensor]:
    """New keys and values for the pipeline's U-Net, in fp32 on the host; the U-Net itself stays as it is.

    The text encoders are on ``device`` only for the time that they are needed.
    """
    prompt_table = build_prompt_table(named_concepts(cfg), cfg.prompts, cfg.seed, preserve_prompts(cfg))
    names = [concept.name for concept in cfg.concepts]
    tokens = collect_tokens(encode(pipeline, prompt_table.texts, device), prompt_table, cfg.uce.tokens, names)
    return edited_weights(pipeline.unet, method, tokens)


def edited_weights(unet: nn.Module, method: ClosedForm, tokens: Tokens) -> dict[str, Tensor]:
    """New keys and values of a U-Net in fp32 on the host. They are computed where the tokens are."""
    projections = {name: unet.get_parameter(name).detach() for name in trainable_names(unet, KEYS_AND_VALUES)}
    return edit_weights(projections, method.text_map(tokens, projections))


@torch.no_grad()
def put_in_place(unet: nn.Module, edited: Mapping[str, Tensor]) -> None:
    """Give a U-Net the weights of an edit, in its own dtype."""
    for name, weight in edited.items():
        unet.get_parameter(name).copy_(weight)


def collect_tokens(text: Text, prompt_table: PromptTable, which: str, names: Sequence[str] = ()) -> Tokens:
    """Every concept's tokens beside what takes their place, and the tokens to be preserved; ``names`` of concepts. The
    first token is fixed: it is the same in every prompt, and much of the attention goes to it."""
    variants = [variant for own in prompt_table.variants for variant in own]
    pairs = [text.of_pair(variant, which) for variant in variants]
    erased, anchors = (torch.cat(side) for side in zip(*pairs, strict=True))
    kept = [text.of_kept(prompt, which) for prompt in prompt_table.retained]
    own = name_rows(text, variants, [len(side) for side, _ in pairs], which, names)
    first = next(iter(text.hidden.values()))[:1]
    return Tokens(erased, anchors, torch.cat(kept) if kept else erased[:0], own, first)


def name_rows(
    text: Text, variants: Sequence[PromptPair], lengths: Sequence[int], which: str, names: Sequence[str]
) -> Tensor | None:
    """The rows in which a concept's name ends, of prompts that are nothing but the name; None without such prompts."""
    rows, begin = [], 0
    for variant, length in zip(variants, lengths, strict=True):
        if variant.prompt in names:
            rows.append(begin + (text.last_word[variant.prompt] if which == "all" else 0))
        begin += length
    return torch.tensor(rows) if rows else None


def encode(pipeline: Pipeline, prompts: Sequence[str], device: torch.device) -> Text:
    """Embed the prompts as the U-Net sees them. The empty one is encoded, too: where zeros stand for it at sampling, a
    concept that was mapped to them would take with it whatever its tokens share with those of other prompts."""
    with encoders_on(pipeline, device):
        embeds = encode_prompts(pipeline, prompts, device, empty_as_text=True)
    hidden = dict(zip(prompts, embeds.hidden.to(device, torch.float64), strict=True))
    return Text(hidden, {prompt: last_word(pipeline, prompt) for prompt in prompts})


def last_word(pipeline: Pipeline, prompt: str) -> int:
    """Position of a prompt's last word; 0, the first token, where there is none."""
    tokenizer, _ = text_encoders(pipeline)[0]
    return len(tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids) - 2
