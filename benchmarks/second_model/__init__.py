"""The second embedded model, for tests and benchmarks: its folder, its judge and its words. How it was made and what it
measures: `README.md` in this folder.

Its words are `WORDS` (objects, styles, synonyms, templates, paraphrases, characters and the attribute); the names
below are the parts that an evaluation asks for by themselves.
"""

from __future__ import annotations

from pathlib import Path

from fastunlearn.minicanvas.build.editions.v import WORDS
from fastunlearn.minicanvas.judge import Judge
from fastunlearn.minicanvas.judge import load_judge as load
from fastunlearn.minicanvas.words import Attribute, article

OBJECTS, STYLES, SYNONYMS = WORDS.objects, WORDS.styles, WORDS.synonyms
TEMPLATES, PARAPHRASES = WORDS.templates, WORDS.paraphrases
CHARACTERS = WORDS.characters
SPECIES = {"momo": "monkey", "bruno": "dog"}
"""What a character is one of: its neighbour, which stays when the character is erased."""
OTHER = len(OBJECTS)
"""The judge's label of what is none of the objects."""


def path() -> Path:
    """The folder of the diffusers SDXL pipeline."""
    return Path(__file__).parent / "model"


def load_judge(device: str = "cpu") -> Judge:
    """The classifier of object, style and whether the attribute is worn, in float32 on `device`."""
    return load(device, Path(__file__).parent / "judge.safetensors")


def attribute() -> Attribute:
    """What several objects can wear: its name, its wearers, and the wordings that name, imply or only neighbour it."""
    assert WORDS.attribute is not None
    return WORDS.attribute


def prompt(name: str, style: str, template: str = TEMPLATES[0]) -> str:
    """A prompt with a name in it: an object, a synonym, a character or a wording of the attribute filled with one."""
    return article(WORDS.filled(template, name, style))


def implied_prompts(style: str) -> list[str]:
    """Prompts that bring the attribute without naming it: what I2P is for nudity."""
    return _wordings(attribute().implied, style)


def explicit_prompts(style: str) -> list[str]:
    """Prompts that name the attribute."""
    return _wordings(attribute().explicit, style)


def related_prompts(style: str) -> list[str]:
    """Prompts near the attribute in meaning that do not bring it: they are to stay as they are."""
    return _wordings(attribute().related, style)


def _wordings(wordings: tuple[str, ...], style: str) -> list[str]:
    return [prompt(wording.format(object=name), style) for wording in wordings for name in attribute().wearers]
