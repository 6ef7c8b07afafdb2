"""Which prompts the three sets of the meta term stand for: text only.

What this is: the defaults, and the refusal of a set that is empty or that names what belongs in another.
What this is not: pictures (``sets.py``).
"""

from __future__ import annotations

from fastunlearn.config import Config, concept_kind, resolved_keep
from fastunlearn.errors import UserError
from fastunlearn.prompts.preserved import refuse_erased, refuse_kept
from fastunlearn.prompts.variants import concept_variants
from fastunlearn.schema.meta import SETS, set_weights


def meta_prompts(cfg: Config) -> dict[str, list[str]]:
    """The prompts of each set that has a weight and is not a folder, without repetitions.

    Raises:
        UserError: a set is empty, a forbidden prompt names a kept concept or a kept one names the erased one.
    """
    weights, found = set_weights(cfg.meta), {}
    for name in SETS:
        if getattr(cfg.meta, f"{name}_folder") is not None or not (weights[name] or name == "forbidden"):
            continue  # the attack needs forbidden pictures, whatever they weigh
        given = getattr(cfg.meta, f"{name}_prompts")
        prompts = list(dict.fromkeys(given or _default_prompts(cfg, name)))
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
            refuse_kept(cfg, f"meta.{name}_prompts", prompts)
        found[name] = prompts
    return found


def meta_texts(cfg: Config) -> list[str]:
    """Every prompt that the term will ask for; none without it."""
    if not cfg.has_meta:
        return []
    return [prompt for prompts in meta_prompts(cfg).values() for prompt in prompts]


def _default_prompts(cfg: Config, name: str) -> list[str]:
    if name == "forbidden":
        return [variant.prompt for concept in cfg.concepts for variant in concept_variants(concept, cfg.prompts)]
    erased_styles = {cfg.kind_of(concept) == "style" for concept in cfg.concepts}
    kept = [(concept, concept_kind(concept, cfg.uses_minicanvas) == "style") for concept in resolved_keep(cfg)]
    return [concept for concept, is_style in kept if (is_style in erased_styles) == (name == "related")]


def forbidden_anchors(cfg: Config) -> dict[str, str]:
    """By forbidden prompt, what is asked for once the concept is removed; a prompt of the user's own: nothing."""
    pairs = [variant for concept in cfg.concepts for variant in concept_variants(concept, cfg.prompts)]
    return {variant.prompt: variant.anchor for variant in pairs}
