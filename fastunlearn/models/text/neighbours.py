"""What a run keeps that names nothing to keep: common names that are near to what it erases.

Only names that the model's tokenizers have as whole words, for what a model has never read it cannot draw; and none
that its text encoder takes for the concept itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastunlearn.config import Config
from fastunlearn.models.loading import Pipeline
from fastunlearn.models.pipeline import encoders_on, text_encoders
from fastunlearn.prompts.common_names import STYLES, THINGS
from fastunlearn.utils.distributed import World

THE_SAME = 0.8
"""A name whose state has this cosine with another's stands for the same thing, as "kitty" does for "cat"."""


def with_neighbours(cfg: Config, pipeline: Pipeline, world: World) -> Config:
    """``keep`` filled with what the model itself says is near, where it names nothing and neighbours are asked for."""
    if not cfg.chooses_neighbours:
        return cfg
    found = neighbours(cfg, pipeline, world.device)
    if not found:
        if world.is_main:
            print("warning: the model knows no common name that could be held; name some with --keep", file=sys.stderr)
        return cfg.model_copy(update={"retain": cfg.retain.model_copy(update={"neighbours": 0})})
    if world.is_main:
        names = "; ".join(found)
        print(f"kept, as nothing else is named: {names} (--keep names others, --retain.neighbours 0 none)")
    return cfg.model_copy(update={"keep": found})


def with_expected_neighbours(cfg: Config) -> Config:
    """The same before there is a model to ask: as many names as it would be, for what a plan counts."""
    if not cfg.chooses_neighbours:
        return cfg
    other = [[name for name in names if not _shares_a_word(cfg, name)] for names in (THINGS, STYLES)]
    return cfg.model_copy(update={"keep": [name for names in other for name in names[: cfg.retain.neighbours]]})


def neighbours(cfg: Config, pipeline: Pipeline, device: torch.device) -> list[str]:
    """``retain.neighbours`` styles and as many things, each the nearest first."""
    erased = [concept.name for concept in cfg.concepts]
    known = [
        [name for name in names if has_whole_words(pipeline, name) and not _shares_a_word(cfg, name)]
        for names in (THINGS, STYLES)
    ]
    states = name_states(pipeline, [*erased, *chain(*known)], device)
    concepts, *of_kinds = states.split([len(erased), *map(len, known)])
    found: list[str] = []
    for names, own in zip(known, of_kinds, strict=True):
        centre = own.mean(0)
        rows = nearest(normalize(own - centre, dim=1), normalize(concepts - centre, dim=1), cfg.retain.neighbours)
        found += [names[row] for row in rows]
    return found


def nearest(states: Tensor, erased: Tensor, count: int) -> list[int]:
    """At most ``count`` rows of ``states`` (N, D), those nearest to any row of ``erased`` (C, D) first, none that is
    the same as one of these or as one that is already chosen. All rows have length 1."""
    closeness = (states @ erased.T).amax(1)
    chosen: list[int] = []
    for row in closeness.argsort(descending=True, stable=True).tolist():
        taken = torch.cat([erased, states[chosen]])
        if len(chosen) < count and (taken @ states[row]).max() < THE_SAME:
            chosen.append(row)
    return chosen


def has_whole_words(pipeline: Pipeline, name: str) -> bool:
    """Whether every tokenizer has each word of a name as one token."""
    tokenizers = [tokenizer for tokenizer, _ in text_encoders(pipeline)]
    return all(len(tokenizer.tokenize(word)) == 1 for tokenizer in tokenizers for word in name.split())


@torch.no_grad()
def name_states(pipeline: Pipeline, names: Sequence[str], device: torch.device) -> Tensor:
    """(N, D) fp32 on the host: what the last text encoder makes of each name alone, at its end.

    Without padding: the encoders are causal, so that what follows a name says nothing of it.
    """
    tokenizer, encoder = text_encoders(pipeline)[-1]
    tokens = [tokenizer(name, truncation=True, max_length=tokenizer.model_max_length).input_ids for name in names]
    states: dict[int, Tensor] = {}
    with encoders_on(pipeline, device):
        for length in sorted({len(ids) for ids in tokens}):
            rows = [row for row, ids in enumerate(tokens) if len(ids) == length]
            batch = torch.tensor([tokens[row] for row in rows], device=device)
            hidden = encoder(batch, output_hidden_states=True).hidden_states[-2]
            states.update(zip(rows, hidden[:, -1].float().cpu(), strict=True))
    return torch.stack([states[row] for row in range(len(names))])


def _shares_a_word(cfg: Config, name: str) -> bool:
    """Whether a name holds a word of a concept, such as "pixel art style" of "pixel style"."""
    words: Sequence[str] = [word for c in cfg.concepts for word in cfg.vocabulary.identity(c.name).split()]
    return not set(words).isdisjoint(cfg.vocabulary.identity(name).split())
