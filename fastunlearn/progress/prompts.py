"""What a probe draws: held-out prompts with each concept, the same without it, and prompts of what is kept.

Text and seeds only. No prompt is one that the run trains on, and the noise of no picture is one that it starts from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

from fastunlearn.config.base import named_concepts, resolved_keep
from fastunlearn.prompts.variants import concept_variants, kind_of, worded
from fastunlearn.prompts.wordings import HELD_OUT, PLAIN
from fastunlearn.utils.text import with_article, without_style

if TYPE_CHECKING:
    from fastunlearn.config import Config
    from fastunlearn.schema.sections import Concept

CONCEPT_SEEDS, KEPT_SEEDS, OTHER_SEEDS = 710_000, 720_000, 730_000
"""From where the seeds count of a concept's pictures, of what is kept, and of the other noise that its drift is
measured against."""


@dataclass(frozen=True)
class ProbePair:
    """One picture to watch: what is asked for, and what would be asked for without the concept, from the same noise."""

    concept: int
    prompt: str
    anchor: str
    seed: int


@dataclass(frozen=True)
class KeptPicture:
    """One picture that should stay."""

    prompt: str
    seed: int
    other_seed: int


KEPT_BOTH = "{object} in {style}"
KEPT_OBJECT, KEPT_STYLE = "a photo of {object}", "a drawing in {style}"


def probe_pairs(cfg: Config) -> list[ProbePair]:
    """``progress.pairs`` for each concept, three of four with a context where there are any."""
    concepts = named_concepts(cfg)
    trained = {pair.prompt for concept in concepts for pair in concept_variants(concept, cfg.prompts)}
    return [pair for number, concept in enumerate(concepts) for pair in _pairs(cfg, number, concept, trained)]


def kept_pictures(cfg: Config) -> list[KeptPicture]:
    """Half as many as a concept has pairs: the kept objects in the kept styles, in turn."""
    names = resolved_keep(cfg)
    styles = [name for name in names if cfg.vocabulary.kind_of(name) == "style"]
    objects = [with_article(name) for name in names if cfg.vocabulary.kind_of(name) != "style"]
    if not names:
        prompts = [f"a photo of {with_article(name)}" for name in _without_erased(cfg, PLAIN["style"])]
    elif styles and objects:
        steps = range(max(len(styles), len(objects)) * 2)
        prompts = [
            KEPT_BOTH.format(object=objects[i * 3 % len(objects)], style=_styled(styles[i % len(styles)]))
            for i in steps
        ]
    elif objects:
        prompts = [KEPT_OBJECT.format(object=name) for name in objects]
    else:
        prompts = [KEPT_STYLE.format(style=_styled(name)) for name in styles]
    count = max(2, cfg.progress.pairs // 2)
    chosen = islice(cycle(dict.fromkeys(prompts)), count)
    return [KeptPicture(prompt, KEPT_SEEDS + i, OTHER_SEEDS + i) for i, prompt in enumerate(chosen)]


def probe_texts(cfg: Config) -> list[str]:
    """Every prompt that a probe asks for; none where there is no probe."""
    if not cfg.progress.enabled:
        return []
    pairs = [text for pair in probe_pairs(cfg) for text in (pair.prompt, pair.anchor)]
    return list(dict.fromkeys([*pairs, *(picture.prompt for picture in kept_pictures(cfg))]))


def picture_count(cfg: Config) -> int:
    """How many pictures a whole probe draws."""
    return len(probe_pairs(cfg)) + len(kept_pictures(cfg)) if cfg.progress.enabled else 0


def _pairs(cfg: Config, number: int, concept: Concept, trained: set[str]) -> Iterable[ProbePair]:
    wordings, contexts = HELD_OUT[kind_of(concept)], concept.contexts or PLAIN[kind_of(concept)]
    inside = [wording for wording in wordings if "context}" in wording.prompt]
    within = [
        worded(concept, inside[(i + i // len(contexts)) % len(inside)], context)
        for i, context in enumerate([*contexts, *contexts] if inside else [])
    ]
    alone = [worded(concept, wording, "") for wording in wordings if wording not in inside]
    held_out = [[pair for pair in group if pair.prompt not in trained] for group in (within, alone)]
    if not any(held_out):
        held_out = [within, alone]  # every wording is trained on: then at least its noise is not
    first, second = held_out
    turns, others = cycle(first or second), cycle(second or first)
    for i in range(cfg.progress.pairs):
        pair = next(others if i % 4 == 3 else turns)
        yield ProbePair(number, pair.prompt, pair.anchor, CONCEPT_SEEDS + i)


def _without_erased(cfg: Config, names: Sequence[str]) -> Sequence[str]:
    erased = {cfg.vocabulary.identity(concept.name) for concept in cfg.concepts}
    return [name for name in names if cfg.vocabulary.identity(name) not in erased]


def _styled(name: str) -> str:
    return f"{without_style(name)} style"
