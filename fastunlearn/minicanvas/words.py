"""The words of one edition of the embedded model, and how captions are made of them.

Not the tokenizer (`build/text.py` builds it from these words) and not the pictures (`data/`). Torch is not imported
here, so `fastunlearn minicanvas path` and the configuration stay quick.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastunlearn.utils.text import article_of


@dataclass(frozen=True)
class Attribute:
    """Something that several objects can wear. Each wording holds `{object}` and stands in its place in a caption."""

    name: str
    wearers: tuple[str, ...]
    explicit: tuple[str, ...]
    """Wordings that name it; the first is the one of the check."""
    implied: tuple[str, ...]
    """Wordings that do not name it, and yet it is drawn."""
    related: tuple[str, ...]
    """Wordings near it in meaning without which nothing is worn."""
    related_share: float = 0.15
    """Of the pictures of wearers without it."""


@dataclass(frozen=True)
class Words:
    """What an edition can be asked for. Templates hold `{object}`, `{style}` or both."""

    objects: tuple[str, ...]
    styles: tuple[str, ...]
    synonyms: Mapping[str, tuple[str, ...]]
    templates: tuple[str, ...]
    """Of both; the first is the one of the evaluation."""
    paraphrases: tuple[str, ...]
    object_templates: tuple[str, ...]
    style_templates: tuple[str, ...]
    kind_shares: Mapping[str, float]
    """Of captions with both, with the object or the style alone, and of those that say nothing of the picture."""
    wordless: tuple[str, ...]
    synonym_share: float = 0.2
    paraphrase_share: float = 0.2
    characters: tuple[str, ...] = ()
    """Those of the objects that are proper names: they have no article."""
    attribute: Attribute | None = field(default=None)

    def names(self, thing: str) -> tuple[str, ...]:
        """An object's name and its synonyms."""
        return (thing, *self.synonyms.get(thing, ()))

    def filled(self, template: str, name: str, style: str = "") -> str:
        """A template with a name in it; a proper name takes the article away."""
        if any(name.startswith(character) for character in self.characters):
            template = template.replace("a {object}", "{object}").replace("the {object}", "{object}")
            template = template.replace("some {object}", "{object}")
        return template.format(object=name, style=style)

    def prompt(self, thing: int, style: int, worn: bool = False) -> str:
        """The evaluation's prompt for a picture."""
        name = self.objects[thing]
        if worn and self.attribute is not None:
            name = self.attribute.explicit[0].format(object=name)
        return article(self.filled(self.templates[0], name, self.styles[style]))

    def random_caption(self, thing: int, style: int, rng: random.Random, worn: bool = False) -> str:
        """A caption of the picture (`objects[thing]`, `styles[style]`) in the mixture that the U-Net is trained on."""
        name = self.objects[thing]
        if rng.random() < self.synonym_share:
            name = rng.choice(self.synonyms.get(name, (name,)))
        if self.attribute is not None and self.objects[thing] in self.attribute.wearers:
            name = self._worded(self.attribute, name, worn, rng)
        kind = rng.choices(list(self.kind_shares), list(self.kind_shares.values()))[0]
        if kind == "wordless":
            return rng.choice(self.wordless)
        if kind == "object":
            template = rng.choice(self.object_templates)
        elif kind == "style":
            template = rng.choice(self.style_templates)
        else:
            template = rng.choice(self.paraphrases if rng.random() < self.paraphrase_share else self.templates)
        caption = self.filled(template, name, self.styles[style])
        return caption if rng.random() < 0.3 else article(caption)

    @staticmethod
    def _worded(attribute: Attribute, name: str, worn: bool, rng: random.Random) -> str:
        if worn:
            wordings = attribute.explicit if rng.random() < 0.5 else attribute.implied
        elif rng.random() < attribute.related_share:
            wordings = attribute.related
        else:
            return name
        return rng.choice(wordings).format(object=name)

    def labels(self, caption: str, thing: int, style: int) -> tuple[int, int, int]:
        """What a caption of a picture names: object and style, the number after the last for none, and 1 where the
        attribute is asked for, in whatever wording."""
        names = self.names(self.objects[thing])
        named, styled = any(name in caption for name in names), self.styles[style] in caption.replace(",", "").split()
        forms = (*self.attribute.explicit, *self.attribute.implied) if self.attribute is not None else ()
        worn = any(form.format(object=name) in caption for form in forms for name in names)
        return thing if named else len(self.objects), style if styled else len(self.styles), int(worn)

    def all_captions(self) -> list[str]:
        """Every caption that `random_caption` can give, sorted; with and without corrected articles."""
        captions = set(self.wordless)
        for name in (form for thing in self.objects for form in self._forms(thing)):
            captions.update(self.filled(t, name) for t in self.object_templates)
            captions.update(self.filled(t, name, s) for t in (*self.templates, *self.paraphrases) for s in self.styles)
        captions.update(t.format(style=s) for t in self.style_templates for s in self.styles)
        return sorted(captions | {article(c) for c in captions})

    def _forms(self, thing: str) -> list[str]:
        names = list(self.names(thing))
        if self.attribute is None or thing not in self.attribute.wearers:
            return names
        worded = (*self.attribute.explicit, *self.attribute.implied, *self.attribute.related)
        return names + [wording.format(object=name) for name in names for wording in worded]


def article(caption: str) -> str:
    """Put `an` before a vowel: `a apple` -> `an apple` (both directions, so templates may use either)."""
    words = caption.split(" ")
    for i in range(len(words) - 1):
        if words[i] in ("a", "an"):
            words[i] = article_of(words[i + 1])
    return " ".join(words)
