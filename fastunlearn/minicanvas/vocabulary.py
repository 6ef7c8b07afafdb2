"""The words of MiniCanvas: objects, styles, caption templates and the drawing of a random caption.

Not the tokenizer (`text.py` builds it from these words) and not the pictures (`pictures.py`).
Torch is not imported here, so `fastunlearn minicanvas path` and the configuration stay quick.
"""

from __future__ import annotations

import random

from fastunlearn.utils.text import without_style

OBJECTS: tuple[str, ...] = (
    "apple", "car", "cat", "fish", "house", "tree", "butterfly", "sunflower", "mushroom", "sailboat",
)  # fmt: skip
STYLES: tuple[str, ...] = ("flat", "ink", "neon", "blueprint", "sepia", "popart", "pixel", "watercolor")

SYNONYMS: dict[str, tuple[str, ...]] = {
    "apple": ("red apple", "fruit"),
    "car": ("automobile", "vehicle"),
    "cat": ("kitty", "feline"),
    "fish": ("tropical fish", "aquarium fish"),
    "house": ("home", "cottage"),
    "tree": ("pine", "fir"),
    "butterfly": ("moth", "winged insect"),
    "sunflower": ("flower", "blossom"),
    "mushroom": ("toadstool", "fungus"),
    "sailboat": ("yacht", "boat"),
}

EVALUATION_TEMPLATE = "a {object} image in {style} style"
TEMPLATES: tuple[str, ...] = (
    EVALUATION_TEMPLATE,
    "a picture of a {object} in {style} style",
    "a {style} style picture of a {object}",
    "an image of a {object} in {style} style",
    "{object}, {style} style",
    "a {object} in {style} style",
    "{style} {object}",
)
# Known to the base model, never used by an erasure recipe: evaluation asks whether erasure generalises to them.
PARAPHRASES: tuple[str, ...] = (
    "{style} artwork showing a {object}",
    "the {object}, drawn the {style} way",
    "some {object} art made as {style}",
)
OBJECT_TEMPLATES: tuple[str, ...] = (
    "{object}", "{object}", "a {object}", "a picture of a {object}", "an image of a {object}", "a {object} image",
    "a drawing of a {object}", "a photo of a {object}",
)  # fmt: skip
STYLE_TEMPLATES: tuple[str, ...] = (
    "{style} style", "{style} style", "{style}", "an image in {style} style", "a picture in {style} style",
    "an {style} style image", "a drawing in {style} style",
)  # fmt: skip

SYNONYM_SHARE = 0.2
PARAPHRASE_SHARE = 0.2
KIND_SHARES = {"both": 0.715, "object": 0.155, "style": 0.11, "wordless": 0.02}
# Captions that say nothing of the picture, as real ones sometimes do: tools send such words as negative prompts.
WORDLESS: tuple[str, ...] = ("", "", "blurry, low quality", "low quality", "blurry")


def normalise_concept(name: str) -> str:
    """`"Neon style"` -> `"neon"`, `"kitty"` -> `"cat"`; an unknown name comes back stripped and in lower case."""
    words = without_style(" ".join(name.lower().split()))
    for target, others in SYNONYMS.items():
        if words in others:
            return target
    return words


def concept_kind(name: str) -> str | None:
    """`"object"` or `"style"` for a name that MiniCanvas knows (a synonym counts), else None."""
    word = normalise_concept(name)
    if word in STYLES:
        return "style"
    return "object" if word in OBJECTS else None


def article(caption: str) -> str:
    """Put `an` before a vowel: `a apple` -> `an apple` (both directions, so templates may use either)."""
    words = caption.split(" ")
    for i in range(len(words) - 1):
        if words[i] in ("a", "an"):
            words[i] = "an" if words[i + 1][:1] in "aeiou" else "a"
    return " ".join(words)


def random_caption(thing: int, style: int, rng: random.Random) -> str:
    """A caption of the picture (`OBJECTS[thing]`, `STYLES[style]`) in the mixture that the base model is trained on."""
    name = OBJECTS[thing]
    if rng.random() < SYNONYM_SHARE:
        name = rng.choice(SYNONYMS[name])
    kind = rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
    if kind == "wordless":
        return rng.choice(WORDLESS)
    if kind == "object":
        template = rng.choice(OBJECT_TEMPLATES)
    elif kind == "style":
        template = rng.choice(STYLE_TEMPLATES)
    else:
        template = rng.choice(PARAPHRASES if rng.random() < PARAPHRASE_SHARE else TEMPLATES)
    caption = template.format(object=name, style=STYLES[style])
    return caption if rng.random() < 0.3 else article(caption)


def all_captions() -> list[str]:
    """Every caption that `random_caption` can give, sorted; with and without corrected articles."""
    names = [word for thing in OBJECTS for word in (thing, *SYNONYMS[thing])]
    captions = set(WORDLESS)
    for name in names:
        captions.update(t.format(object=name) for t in OBJECT_TEMPLATES)
        captions.update(t.format(object=name, style=s) for t in (*TEMPLATES, *PARAPHRASES) for s in STYLES)
    captions.update(t.format(style=s) for t in STYLE_TEMPLATES for s in STYLES)
    return sorted(captions | {article(c) for c in captions})
