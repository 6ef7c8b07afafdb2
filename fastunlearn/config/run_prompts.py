"""The prompts that follow from a whole configuration: of what is retained, and of the meta term's three sets.

Text only, also that of folders of images. The prompts of the concepts themselves are ``prompts/variants.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fastunlearn.config.base import RunConfig, named_concepts, resolved_keep
from fastunlearn.errors import UserError
from fastunlearn.prompts import retained
from fastunlearn.prompts.captions import read_captions
from fastunlearn.prompts.variants import PromptPair, concept_variants
from fastunlearn.schema.meta import SETS, set_weights


def retain_prompts(cfg: RunConfig) -> list[str]:
    """``retain.prompts`` with {object} and {style} filled by every kept concept of that kind, without repetitions.

    Raises:
        UserError: nothing is kept, a template has an unknown field, or a prompt names a concept to be erased.
    """
    templates = cfg.retain.prompts or retained.DEFAULT_TEMPLATES
    prompts = retained.fill_templates(templates, resolved_keep(cfg), cfg.vocabulary)
    if not prompts:
        raise UserError(
            "retain.prompts: nothing to retain; list prompts, or name kept concepts with --keep, or set "
            "surgery.enabled to false"
        )
    refuse_erased(cfg, "retain.prompts", prompts)
    return list(dict.fromkeys(prompts))


def preserve_prompts(cfg: RunConfig) -> list[str]:
    """As ``retain_prompts``, for a closed-form edit, which can do without: none where nothing is kept.

    Raises:
        UserError: a template has an unknown field, or a prompt names a concept to be erased.
    """
    return retain_prompts(cfg) if cfg.retain.prompts or resolved_keep(cfg) else []


def refuse_erased(cfg: RunConfig, field: str, prompts: Iterable[str]) -> None:
    """Raises UserError if a prompt names a concept to be erased (on MiniCanvas also by a synonym)."""
    retained.refuse_erased([concept.name for concept in cfg.concepts], cfg.vocabulary, field, prompts)


def folder_captions(cfg: RunConfig) -> list[tuple[Path, str]]:
    """(image, caption) of ``retain.folder``, sorted by name.

    Raises:
        UserError: no folder, no image, an image without a caption, or a caption that names an erased concept.
    """
    if cfg.retain.folder is None:
        raise UserError("retain.folder: none given; retain.source 'folder' needs images with captions")
    pairs = read_captions(Path(cfg.retain.folder), "retain.folder")
    for image, caption in pairs:
        refuse_erased(cfg, f"retain.folder: {image.name}", [caption])
    return pairs


def set_captions(cfg: RunConfig) -> dict[str, list[tuple[Path, str]]]:
    """(image, caption) of every set that is a folder.

    Raises:
        UserError: no folder, no caption, too few images, or one of what is kept that names what is to be erased.
    """
    found: dict[str, list[tuple[Path, str]]] = {}
    for name in SETS if cfg.has_meta else ():
        folder, field = getattr(cfg.meta, f"{name}_folder"), f"meta.{name}_folder"
        if folder is None:
            continue
        found[name] = read_captions(Path(folder), field)
        least = max(cfg.meta.batch_size, cfg.meta.inner_batch_size) * (2 if name == "forbidden" else 1)
        if len(found[name]) < least:
            raise UserError(f"{field}: {folder} holds {len(found[name])} images; at least {least} are needed")
        if name != "forbidden":
            for image, caption in found[name]:
                refuse_erased(cfg, f"{field}: {image.name}", [caption])
    return found


def meta_prompts(cfg: RunConfig) -> dict[str, list[str]]:
    """The prompts of each set of the meta term that has a weight and is not a folder, without repetitions.

    Raises:
        UserError: a set is empty, a forbidden prompt names a kept concept or a kept one names the erased one.
    """
    weights, found = set_weights(cfg.meta), {}
    for name in SETS:
        if getattr(cfg.meta, f"{name}_folder") is not None or not (weights[name] or name == "forbidden"):
            continue  # the attack needs forbidden pictures, whatever they weigh
        given = getattr(cfg.meta, f"{name}_prompts")
        prompts = list(dict.fromkeys(given or _default_meta_prompts(cfg, name)))
        if not prompts:
            raise UserError(
                f"meta.{name}_prompts: none, and no kept concept to take them from; list prompts, name concepts with "
                f"--keep, or set meta.{name}_weight to 0"
            )
        for prompt in prompts:
            if not prompt.strip():
                raise UserError(f"meta.{name}_prompts: {prompt!r} is empty; every prompt needs words")
        if name != "forbidden":
            refuse_erased(cfg, f"meta.{name}_prompts", prompts)
        elif given:
            retained.refuse_kept(resolved_keep(cfg), cfg.vocabulary, f"meta.{name}_prompts", prompts)
        found[name] = prompts
    return found


def meta_texts(cfg: RunConfig) -> list[str]:
    """Every prompt that the meta term will ask for; none without it."""
    if not cfg.has_meta:
        return []
    return [prompt for prompts in meta_prompts(cfg).values() for prompt in prompts]


def forbidden_anchors(cfg: RunConfig) -> dict[str, str]:
    """By forbidden prompt, what is asked for once the concept is removed; a prompt of the user's own: nothing."""
    return {pair.prompt: pair.anchor for pair in _concept_pairs(cfg)}


def _concept_pairs(cfg: RunConfig) -> list[PromptPair]:
    return [pair for concept in named_concepts(cfg) for pair in concept_variants(concept, cfg.prompts)]


def _default_meta_prompts(cfg: RunConfig, name: str) -> list[str]:
    if name == "forbidden":
        return [pair.prompt for pair in _concept_pairs(cfg)]
    erased_styles = {cfg.kind_of(concept) == "style" for concept in cfg.concepts}
    kept = [(concept, cfg.vocabulary.kind_of(concept) == "style") for concept in resolved_keep(cfg)]
    return [concept for concept, is_style in kept if (is_style in erased_styles) == (name == "related")]
