"""Prompts of a run: what each trajectory is asked to draw, what its concept is measured against, and augmentations.

Text only. Every prompt that a run can ask for is known before it starts, so that all of them are encoded once and the
text encoders are freed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastunlearn.prompts.vocabulary import GENERIC
from fastunlearn.prompts.wordings import PLAIN, TRAINED, Wording
from fastunlearn.schema.sections import Concept, PromptsConfig
from fastunlearn.utils.text import with_article, without_style

UNCONDITIONAL = ""
AUGMENT_WORDS = (
    "a photo of", "detailed", "a picture of", "close-up", "in the scene", "vivid", "high quality", "a view of",
    "simple", "beautiful", "an image of", "on display", "with care", "centered",
)  # fmt: skip


@dataclass(frozen=True)
class PromptPair:
    """One way to ask for a concept, and the prompt that asks for the same picture without it.

    The erased direction is ``e(prompt) - e(anchor)``. With the bare name and no anchor this is the published rule,
    whose anchor is the unconditional prompt.
    """

    prompt: str
    anchor: str


@dataclass
class PromptTable:
    """All prompts of a run with their row in the embedding table; row 0 is the unconditional prompt."""

    variants: list[list[PromptPair]]
    augmented: list[list[str]]
    retained: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    """Whatever else a run asks for."""
    index: dict[str, int] = field(default_factory=dict)
    """Prompt -> row; not given: numbered as they come."""

    def __post_init__(self) -> None:
        if self.index:
            return
        texts = [UNCONDITIONAL]
        for variants, augmented in zip(self.variants, self.augmented, strict=True):
            texts += [text for variant in variants for text in (variant.prompt, variant.anchor)] + augmented
        texts += [*self.retained, *self.others]
        self.index = {text: row for row, text in enumerate(dict.fromkeys(texts))}

    @property
    def texts(self) -> list[str]:
        """Every distinct prompt, in table order."""
        return list(self.index)

    def of_retained(self) -> PromptTable:
        """The retained prompts instead of every concept's own, with the rows of this table."""
        variants = [[PromptPair(prompt, UNCONDITIONAL) for prompt in self.retained]] * len(self.variants)
        return PromptTable(variants, [[]] * len(self.variants), index=self.index)


def build_prompt_table(
    concepts: Sequence[Concept],
    config: PromptsConfig,
    seed: int,
    retained: Sequence[str] = (),
    others: Sequence[str] = (),
) -> PromptTable:
    """Expand the templates of every concept and draw its pool of augmented prompts; add the prompts to be retained, and
    others."""
    draw = random.Random(seed)
    variants = [concept_variants(concept, config) for concept in concepts]
    augmented = [
        [augment(concept.name, options[i % len(options)].prompt, i % 4, draw) for i in range(config.augment_pool)]
        for concept, options in zip(concepts, variants, strict=True)
    ]
    return PromptTable(variants, augmented, list(retained), list(others))


def concept_variants(concept: Concept, config: PromptsConfig) -> list[PromptPair]:
    """Fill the templates, or where none are given the wordings of its kind, with a concept, once per context where a
    template asks for one.

    A template with a context would, measured against the unconditional prompt, also erase the context. So its anchor
    is the same template with the concept replaced by ``concept.anchor``, or ``anchor_templates`` where nothing
    replaces it.
    """
    kind = kind_of(concept)
    if config.templates:
        anchors = config.anchor_templates or [UNCONDITIONAL] * len(config.templates)
        wordings = [Wording(*texts) for texts in zip(config.templates, anchors, strict=True)]
    else:
        wordings = list(TRAINED[kind])
    contexts = concept.contexts or config.contexts or PLAIN[kind]
    return [
        worded(concept, wording, context, config.contextual_anchor)
        for wording in wordings
        for context in (contexts if "context}" in wording.prompt else [""])
    ]


def kind_of(concept: Concept) -> str:
    """As given, or as its name alone suggests."""
    return concept.kind if concept.kind != "auto" else GENERIC.kind_of(concept.name)


def worded(concept: Concept, wording: Wording, context: str, contextual_anchor: bool = True) -> PromptPair:
    """One prompt with a concept, and the same with the anchor in its place, or without it."""
    prompt = _fill(wording.prompt, concept, concept.name, context)
    if concept.anchor:
        return PromptPair(prompt, _fill(wording.prompt, concept, concept.anchor, context))
    if not contextual_anchor:
        return PromptPair(prompt, UNCONDITIONAL)
    return PromptPair(prompt, _fill(wording.anchor, concept, "", context))


def _fill(template: str, concept: Concept, name: str, context: str) -> str:
    proper = concept.kind == "instance"
    return template.format(
        concept=name, word=without_style(name), a_concept=name if proper else with_article(name), context=context,
        a_context=with_article(context),
    )  # fmt: skip


def augment(concept: str, prompt: str, operation: int, draw: random.Random) -> str:
    """Perturb a prompt as KSCU's tail does: shuffle, drop a word (not the concept's), add a prefix or suffix."""
    words = prompt.split()
    if operation == 0:
        draw.shuffle(words)
    elif operation == 1:
        droppable = [i for i, word in enumerate(words) if word not in concept.split()]
        if droppable:
            words.pop(draw.choice(droppable))
    else:
        extra = [draw.choice(AUGMENT_WORDS) for _ in range(draw.randint(1, 3))]
        words = extra + words if operation == 2 else words + extra
    return " ".join(words)
