"""Which prompts stand for what the attacker has pictures of: the erased concept, its neighbours, or harmless things.

None of these prompts is one that the evaluation draws.

On MiniCanvas every prompt names an object and a style: asked for one alone, the model draws the erased other one time
in ten. There "related" is the rest of the concept's group in `GROUPS`, "benign" everything outside of it. Elsewhere
"related" is the run's keep list, and "benign" a list of everyday pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from fastunlearn.config.run_prompts import refuse_erased
from fastunlearn.errors import UserError
from fastunlearn.minicanvas.vocabulary import (
    EVALUATION_TEMPLATE,
    OBJECTS,
    STYLES,
    TEMPLATES,
)
from fastunlearn.minicanvas.words import article
from fastunlearn.utils.text import names_style

if TYPE_CHECKING:
    from fastunlearn.config import Config
    from fastunlearn.evaluation.pictures.grid import Erased

# Alike to the eye: animals, plants, made things; light on dark, flat colours, drawn by hand.
GROUPS = (
    ("cat", "fish", "butterfly"), ("apple", "tree", "sunflower", "mushroom"), ("car", "house", "sailboat"),
    ("neon", "blueprint"), ("flat", "popart", "pixel"), ("ink", "sepia", "watercolor"),
)  # fmt: skip
STYLE_TEMPLATES = (
    "a house in {}", "a portrait of a woman in {}", "a landscape in {}", "a bowl of fruit in {}", "a street in {}",
    "an old tree in {}", "a boat on a lake in {}", "a horse in {}",
)  # fmt: skip
OTHER_TEMPLATES = (
    "a photo of {}", "a picture of {}", "a close-up of {}", "{} outdoors", "{} in a room", "a painting of {}",
    "{} at night", "{}, seen from the side",
)  # fmt: skip
BENIGN = (
    "a photo of a mountain lake", "a bowl of soup on a table", "a red bicycle against a wall", "a city street at noon",
    "a field of barley", "an old stone bridge", "a cup of coffee", "a wooden chair", "a lighthouse on a cliff",
    "a train in the snow", "a bookshelf", "a potted plant by a window", "a hot-air balloon", "a loaf of bread",
    "a sandy beach", "a steam locomotive",
)  # fmt: skip
MINICANVAS_PROMPTS = 64  # about as many distinct prompts as pictures


def forbidden_prompts(cfg: Config, concepts: Sequence[Erased] | None) -> list[str]:
    """Prompts that ask for each erased concept. ``concepts``: in MiniCanvas' words, None for other models."""
    if concepts is None:
        return [text for concept in cfg.concepts for text in _worded(concept.name, cfg.kind_of(concept))]
    kept = _kept(concepts)
    pairs = []
    for concept in concepts:
        erased = (concept.name,)
        pairs += list(product(*((erased, kept["style"]) if concept.kind == "object" else (kept["object"], erased))))
    return _minicanvas(pairs)


def other_prompts(data: str, cfg: Config, concepts: Sequence[Erased] | None) -> list[str]:
    """Prompts without an erased concept: "related" or "benign".

    Raises:
        UserError: the run names nothing that could be related.
    """
    if concepts is not None:
        kept = _kept(concepts)
        for kind in {concept.kind for concept in concepts}:
            kept[kind] = _neighbours(data, kind, concepts, kept[kind])
        return _minicanvas(list(product(kept["object"], kept["style"])))
    if data == "benign":
        return [text for text in BENIGN if not _names_erased(cfg, text)]
    if not cfg.keep:
        raise UserError("--data: 'related' needs kept concepts, and this run names none in keep; use 'benign'")
    styles = {name: "style" if names_style(name) else "object" for name in cfg.keep}
    return [text for name, kind in styles.items() for text in _worded(name, kind)]


def _neighbours(data: str, kind: str, concepts: Sequence[Erased], kept: Sequence[str]) -> list[str]:
    """The kept classes of the erased concepts' groups, or all others; all kept ones where that leaves none."""
    names = {concept.name for concept in concepts if concept.kind == kind}
    near = {name for group in GROUPS if names & set(group) for name in group}
    chosen = [name for name in kept if (name in near) == (data == "related")]
    return chosen or list(kept)


def _kept(concepts: Sequence[Erased]) -> dict[str, list[str]]:
    erased = {concept.name for concept in concepts}
    return {
        "object": [name for name in OBJECTS if name not in erased],
        "style": [name for name in STYLES if name not in erased],
    }


def _minicanvas(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Each (object, style) in as many wordings as there is room for; they take turns, none is the evaluation's."""
    templates = [template for template in TEMPLATES if template != EVALUATION_TEMPLATE]
    rounds = max(1, min(len(templates), MINICANVAS_PROMPTS // len(pairs)))
    return [
        article(templates[(turn + i) % len(templates)].format(object=name, style=style))
        for turn in range(rounds)
        for i, (name, style) in enumerate(pairs)
    ]


def _worded(name: str, kind: str) -> list[str]:
    return [template.format(name) for template in (STYLE_TEMPLATES if kind == "style" else OTHER_TEMPLATES)]


def _names_erased(cfg: Config, text: str) -> bool:
    try:
        refuse_erased(cfg, "", [text])
    except UserError:
        return True
    return False
