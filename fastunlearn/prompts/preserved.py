"""Which prompts stand for what must be kept, and the refusal of one that names what is to be erased.

What this is: text only. What this is not: pictures or latents (``retain.py``).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from string import Formatter

from fastunlearn.config import Config, concept_kind, resolved_keep
from fastunlearn.errors import UserError

FIELDS = ("object", "style")
DEFAULT_TEMPLATES = ("{object}", "{style}", "a picture of a {object} in {style}")


def retain_prompts(cfg: Config) -> list[str]:
    """``retain.prompts`` with {object} and {style} filled by every kept concept of that kind, without repetitions.

    Raises:
        UserError: nothing is kept, a template has an unknown field, or a prompt names a concept to be erased.
    """
    kept: dict[str, list[str]] = {field: [] for field in FIELDS}
    for name in resolved_keep(cfg):
        kind = concept_kind(name, cfg.uses_minicanvas)
        kept["style" if kind == "style" else "object"].append(name)
    prompts = [p for template in cfg.retain.prompts or DEFAULT_TEMPLATES for p in _filled(template, kept)]
    if not prompts:
        raise UserError(
            "retain.prompts: nothing to retain; list prompts, or name kept concepts with --keep, or set "
            "surgery.enabled to false"
        )
    refuse_erased(cfg, "retain.prompts", prompts)
    return list(dict.fromkeys(prompts))


def preserve_prompts(cfg: Config) -> list[str]:
    """As ``retain_prompts``, for a closed-form edit, which can do without: none where nothing is kept.

    Raises:
        UserError: a template has an unknown field, or a prompt names a concept to be erased.
    """
    return retain_prompts(cfg) if cfg.retain.prompts or resolved_keep(cfg) else []


def refuse_erased(cfg: Config, field: str, prompts: Iterable[str]) -> None:
    """Raises UserError if a prompt names a concept to be erased (on MiniCanvas also by a synonym)."""
    for prompt in prompts:
        for concept in cfg.concepts:
            for word in _names(concept.name, cfg.uses_minicanvas):
                if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt.lower()):
                    raise UserError(
                        f"{field}: {prompt!r} names {concept.name!r}, which is to be erased; a retain sample must not"
                    )


def refuse_kept(cfg: Config, field: str, prompts: Iterable[str]) -> None:
    """Raises UserError if a prompt of what shall be forgotten asks for nothing but a kept concept."""
    kept = {word: name for name in resolved_keep(cfg) for word in _names(name, cfg.uses_minicanvas)}
    for prompt in prompts:
        name = kept.get(" ".join(prompt.lower().split()))
        if name is not None:
            raise UserError(f"{field}: {prompt!r} is the kept concept {name!r}; name what is to be erased")


def _filled(template: str, kept: dict[str, list[str]]) -> list[str]:
    try:
        fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError:
        fields = ["?"]
    for field in fields:
        if field not in FIELDS:
            raise UserError(f"retain.prompts: {template!r} may hold {{object}} and {{style}} only")
    choices = [kept[field] for field in fields]
    return [template.format(**dict(zip(fields, words, strict=True))) for words in itertools.product(*choices)]


def _names(concept: str, minicanvas: bool) -> Sequence[str]:
    words = " ".join(concept.lower().split())
    if not minicanvas:
        return [words]
    from fastunlearn.minicanvas import vocabulary

    word = vocabulary.normalise_concept(words)
    return [word, *vocabulary.SYNONYMS.get(word, ())]
