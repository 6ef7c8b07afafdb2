"""The words of MiniCanvas: objects, styles and caption templates. How captions are made of them: `words.py`."""

from __future__ import annotations

from fastunlearn.minicanvas.words import Words
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

KIND_SHARES = {"both": 0.715, "object": 0.155, "style": 0.11, "wordless": 0.02}
# Captions that say nothing of the picture, as real ones sometimes do: tools send such words as negative prompts.
WORDLESS: tuple[str, ...] = ("", "", "blurry, low quality", "low quality", "blurry")

WORDS = Words(
    OBJECTS, STYLES, SYNONYMS, TEMPLATES, PARAPHRASES, OBJECT_TEMPLATES, STYLE_TEMPLATES, KIND_SHARES, WORDLESS
)


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
