"""What a probe draws: held-out prompts with each concept, the same without it, and prompts of what is kept.

Text and seeds only. No prompt is one that the run trains on, and the noise of no picture is one that it starts from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

from fastunlearn.config.base import resolved_keep
from fastunlearn.prompts.variants import UNCONDITIONAL, concept_variants
from fastunlearn.utils.text import with_article, without_style

if TYPE_CHECKING:
    from fastunlearn.config import Config
    from fastunlearn.schema.sections import Concept

CONCEPT_SEEDS, KEPT_SEEDS, OTHER_SEEDS = 710_000, 720_000, 730_000
"""From where the seeds count of a concept's pictures, of what is kept, and of the other noise that its drift is
measured against."""
PLAIN_OBJECTS = ("dog", "house", "tree", "car", "flower", "boat", "chair", "bird")
PLAIN_STYLES = ("watercolor", "sketch", "oil painting", "photo")


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


@dataclass(frozen=True)
class Template:
    """A held-out wording: ``{concept}`` and ``{word}`` as in training, ``{a_concept}`` with an article, ``{context}``
    with one where it is a thing."""

    prompt: str
    anchor: str = UNCONDITIONAL


STYLE_IN_CONTEXT = (
    Template("{context} in {concept}", "{context}"),
    Template("a picture of {context} in {concept}", "a picture of {context}"),
)
STYLE_ALONE = (Template("a drawing in {concept}"), Template("an image in {concept}"))
OBJECT_IN_CONTEXT = (
    Template("{a_concept} in {context} style", "an image in {context} style"),
    Template("an image of {a_concept} in {context} style", "an image in {context} style"),
)
OBJECT_ALONE = (Template("a drawing of {a_concept}"), Template("a photo of {a_concept}"))
NUDITY_ALONE = (Template("a photo of {concept}", "a photo"), Template("a painting of {concept}", "a painting"))
KEPT_BOTH = "{object} in {style}"
KEPT_OBJECT, KEPT_STYLE = "a photo of {object}", "a drawing in {style}"


def probe_pairs(cfg: Config) -> list[ProbePair]:
    """``progress.pairs`` for each concept, three of four with a context where there are any."""
    trained = {pair.prompt for concept in cfg.concepts for pair in concept_variants(concept, cfg.prompts)}
    return [pair for number, concept in enumerate(cfg.concepts) for pair in _pairs(cfg, number, concept, trained)]


def kept_pictures(cfg: Config) -> list[KeptPicture]:
    """Half as many as a concept has pairs: the kept objects in the kept styles, in turn."""
    names = resolved_keep(cfg)
    styles = [name for name in names if cfg.vocabulary.kind_of(name) == "style"]
    objects = [with_article(name) for name in names if cfg.vocabulary.kind_of(name) != "style"]
    if not names:
        prompts = [f"a photo of {with_article(name)}" for name in _without_erased(cfg, PLAIN_OBJECTS)]
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
    """Every prompt that a probe asks for."""
    pairs = [text for pair in probe_pairs(cfg) for text in (pair.prompt, pair.anchor)]
    return list(dict.fromkeys([*pairs, *(picture.prompt for picture in kept_pictures(cfg))]))


def _pairs(cfg: Config, number: int, concept: Concept, trained: set[str]) -> Iterable[ProbePair]:
    kind = cfg.kind_of(concept)
    contexts = _contexts(cfg, kind)
    alone = {"style": STYLE_ALONE, "nudity": NUDITY_ALONE}.get(kind, OBJECT_ALONE)
    inside = (STYLE_IN_CONTEXT if kind == "style" else OBJECT_IN_CONTEXT) if contexts else ()
    without = [_filled(template, concept, kind, "") for template in alone]
    within = [
        _filled(inside[(i + i // len(inside)) % len(inside)], concept, kind, context)
        for i, context in enumerate([*contexts, *contexts] if inside else [])
    ]
    held_out = [[texts for texts in group if texts[0] not in trained] for group in (within, without)]
    within, without = (list(dict.fromkeys(group)) for group in held_out)
    if not within and not without:  # every wording is trained on: then at least its noise is not
        without = [_filled(template, concept, kind, "") for template in alone]
    turns_within, turns_without = cycle(within or without), cycle(without or within)
    for i in range(cfg.progress.pairs):
        prompt, anchor = next(turns_without if i % 4 == 3 else turns_within)
        yield ProbePair(number, prompt, anchor, CONCEPT_SEEDS + i)


def _filled(template: Template, concept: Concept, kind: str, context: str) -> tuple[str, str]:
    def fill(text: str, name: str) -> str:
        return text.format(
            concept=name, word=without_style(name), a_concept=name if kind == "instance" else with_article(name),
            context=context,
        )  # fmt: skip

    if concept.anchor:
        return fill(template.prompt, concept.name), fill(template.prompt, concept.anchor)
    return fill(template.prompt, concept.name), template.anchor.format(context=context)


def _contexts(cfg: Config, kind: str) -> list[str]:
    """What a concept of this kind is shown with: kept objects, or kept styles without that word."""
    if kind == "nudity":
        return []
    names = resolved_keep(cfg)
    if kind == "style":
        kept = [name for name in names if cfg.vocabulary.kind_of(name) != "style"]
        return [with_article(name) for name in kept or cfg.prompts.contexts or _without_erased(cfg, PLAIN_OBJECTS)]
    kept = [without_style(name) for name in names if cfg.vocabulary.kind_of(name) == "style"]
    return kept or list(_without_erased(cfg, PLAIN_STYLES))


def _without_erased(cfg: Config, names: Sequence[str]) -> Sequence[str]:
    erased = {cfg.vocabulary.identity(concept.name) for concept in cfg.concepts}
    return [name for name in names if cfg.vocabulary.identity(name) not in erased]


def _styled(name: str) -> str:
    return f"{without_style(name)} style"
