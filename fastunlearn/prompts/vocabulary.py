"""What the names of concepts mean: their kind, which names are the same, which words ask for them.

``GENERIC`` reads the words alone; ``MiniCanvasVocabulary`` knows the embedded model's ten objects and eight styles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastunlearn.minicanvas import vocabulary as minicanvas
from fastunlearn.utils.text import names_style, without_style

NUDITY_NAMES = frozenset({"nudity", "nude", "nsfw", "naked"})


class ConceptVocabulary(Protocol):
    """What a model calls things."""

    def kind_of(self, name: str) -> str:
        """ "style", "object" or "nudity" ("instance" has to be asked for)."""
        ...

    def identity(self, name: str) -> str:
        """Equal for names of the same concept: "Neon" and "neon style"."""
        ...

    def words_of(self, name: str) -> Sequence[str]:
        """What a prompt that asks for the concept would hold one of, in lower case."""
        ...

    def known_names(self) -> Sequence[str] | None:
        """Every name there is, as a user writes it; None where there is no end to them."""
        ...

    def nearest_among(self) -> Sequence[str]:
        """What a mistyped name is compared with."""
        ...


class GenericVocabulary:
    """Any model: a name that ends in " style" is a style."""

    def kind_of(self, name: str) -> str:
        """By the words of the name."""
        words = _normalised(name)
        if words in NUDITY_NAMES:
            return "nudity"
        return "style" if names_style(words) else "object"

    def identity(self, name: str) -> str:
        """In lower case, without " style"."""
        return without_style(_normalised(name))

    def words_of(self, name: str) -> Sequence[str]:
        """The name itself."""
        return [_normalised(name)]

    def known_names(self) -> Sequence[str] | None:
        """Nobody knows them all."""
        return None

    def nearest_among(self) -> Sequence[str]:
        """Nothing."""
        return ()


class MiniCanvasVocabulary(GenericVocabulary):
    """The embedded model: synonyms count ("kitty" is "cat"), and other names are not drawn."""

    def kind_of(self, name: str) -> str:
        """As MiniCanvas was trained; by the words for a name that it does not know."""
        return minicanvas.concept_kind(name) or super().kind_of(name)

    def identity(self, name: str) -> str:
        """The word of its vocabulary."""
        return minicanvas.normalise_concept(name)

    def words_of(self, name: str) -> Sequence[str]:
        """The word and its synonyms."""
        word = minicanvas.normalise_concept(_normalised(name))
        return [word, *minicanvas.SYNONYMS.get(word, ())]

    def known_names(self) -> Sequence[str] | None:
        """Styles, then objects."""
        return [f"{style} style" for style in minicanvas.STYLES] + list(minicanvas.OBJECTS)

    def nearest_among(self) -> Sequence[str]:
        """Styles also without the word."""
        return [*(self.known_names() or ()), *minicanvas.STYLES]


GENERIC = GenericVocabulary()
MINICANVAS = MiniCanvasVocabulary()


def _normalised(name: str) -> str:
    return " ".join(name.lower().split())
