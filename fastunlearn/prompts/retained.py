"""Templates of what must be kept, filled with the kept concepts; and which prompts name an erased or a kept concept."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from string import Formatter

from fastunlearn.errors import UserError
from fastunlearn.prompts.vocabulary import ConceptVocabulary

FIELDS = ("object", "style")
DEFAULT_TEMPLATES = ("{object}", "{style}", "a picture of a {object} in {style}")


def fill_templates(templates: Sequence[str], keep: Iterable[str], vocabulary: ConceptVocabulary) -> list[str]:
    """Each template with {object} and {style} filled by every kept concept of that kind; with repetitions.

    Raises:
        UserError: a template has another field.
    """
    kept: dict[str, list[str]] = {field: [] for field in FIELDS}
    for name in keep:
        kept["style" if vocabulary.kind_of(name) == "style" else "object"].append(name)
    return [prompt for template in templates for prompt in _filled(template, kept)]


def refuse_erased(erased: Iterable[str], vocabulary: ConceptVocabulary, field: str, prompts: Iterable[str]) -> None:
    """Raises UserError if a prompt names a concept to be erased (on MiniCanvas also by a synonym)."""
    words = [(name, word) for name in erased for word in vocabulary.words_of(name)]
    for prompt in prompts:
        for name, word in words:
            if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt.lower()):
                raise UserError(f"{field}: {prompt!r} names {name!r}, which is to be erased; a retain sample must not")


def refuse_kept(keep: Iterable[str], vocabulary: ConceptVocabulary, field: str, prompts: Iterable[str]) -> None:
    """Raises UserError if a prompt of what shall be forgotten asks for nothing but a kept concept."""
    kept = {word: name for name in keep for word in vocabulary.words_of(name)}
    for prompt in prompts:
        name = kept.get(" ".join(prompt.lower().split()))
        if name is not None:
            raise UserError(f"{field}: {prompt!r} is the kept concept {name!r}; name what is to be erased")


def _filled(template: str, kept: Mapping[str, list[str]]) -> list[str]:
    try:
        fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError:
        fields = ["?"]
    for field in fields:
        if field not in FIELDS:
            raise UserError(f"retain.prompts: {template!r} may hold {{object}} and {{style}} only")
    choices = [kept[field] for field in fields]
    return [template.format(**dict(zip(fields, words, strict=True))) for words in itertools.product(*choices)]
