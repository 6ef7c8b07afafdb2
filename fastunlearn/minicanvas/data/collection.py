"""What one edition of the embedded model is drawn from: its words, its drawings and its styles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastunlearn.minicanvas.data.styles import STYLE_FUNCTIONS, Style
from fastunlearn.minicanvas.vocabulary import WORDS
from fastunlearn.minicanvas.words import Words


@dataclass(frozen=True)
class Collection:
    """Folders of drawings (`pictures/SET/NAME.png`) and what is made of them."""

    words: Words
    styles: Mapping[str, Style]
    pictures: Path
    generator_sets: tuple[str, ...]
    judge_sets: tuple[str, ...]
    """The judge knows more drawings."""
    held_out_sets: tuple[str, ...]
    """Read by tests and reports only."""

    @property
    def looks(self) -> list[tuple[int, bool]]:
        """What there is to draw in each style: every object, and then those that wear the attribute, with it."""
        attribute = self.words.attribute
        wearers = attribute.wearers if attribute is not None else ()
        plain = [(thing, False) for thing in range(len(self.words.objects))]
        return plain + [(self.words.objects.index(name), True) for name in wearers]

    @property
    def other(self) -> int:
        """The label of what is none of the objects."""
        return len(self.words.objects)


CANVAS = Collection(
    words=WORDS,
    styles=STYLE_FUNCTIONS,
    pictures=Path(__file__).parent.parent / "pictures",
    generator_sets=("noto", "fluent", "twemoji"),
    judge_sets=("noto", "fluent", "twemoji", "emojione"),
    held_out_sets=("noto-v1",),
)
