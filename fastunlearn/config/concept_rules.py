"""Rules of a configuration that span several fields, and defaults that depend on method and kind of concept.

What this is: tables and refusals in plain Python; ``config.py`` calls them when a ``Config`` is built.
What this is not: single-field ranges (in the schema) or anything that reads the disk (``preflight.py``).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING

from fastunlearn.config.engine_rules import check_engine, check_ranks
from fastunlearn.config.method_rules import check_base_methods
from fastunlearn.errors import UserError, nearest
from fastunlearn.sampling.key_steps import scale_start
from fastunlearn.schema.attention_rules import attention_refusal
from fastunlearn.schema.meta import check_meta

if TYPE_CHECKING:
    from fastunlearn.config import Config
    from fastunlearn.schema.sections import PromptsConfig


@dataclass(frozen=True)
class KindDefaults:
    """KSCU's settings for one kind of concept."""

    start: int  # first trained index on a 50-step scale
    steps: int  # updates for one concept
    steps_for_several: int  # updates for more than one concept
    scope: str


# The released KSCU trainer for SD 1.4 (arXiv 2507.06526): objects and nudity live in the layout, styles in the detail.
KSCU_DEFAULTS = {
    "style": KindDefaults(start=24, steps=500, steps_for_several=500, scope="attn2"),
    "object": KindDefaults(start=14, steps=750, steps_for_several=750, scope="noxattn"),
    "nudity": KindDefaults(start=14, steps=750, steps_for_several=750, scope="noxattn"),
    "instance": KindDefaults(start=40, steps=200, steps_for_several=750, scope="attn2"),
}
# ESD (arXiv 2303.07345) trains 1000 updates, DoCo (2405.15304) 2000, SDD (2307.05977) 1500, whatever the concept; UCE
# (2308.14761) and RECE (2407.12383) edit in closed form.
META_STEPS = 100  # of the meta term alone, after an edit in closed form (2410.12777)
METHOD_STEPS = {"esd": 1000, "doco": 2000, "sdd": 1500, "uce": 0, "rece": 0}
ESD_SCOPES = {"x": "attn2", "x-strict": "attn2_kv", "u": "noxattn", "full": "full"}

NUDITY_NAMES = frozenset({"nudity", "nude", "nsfw", "naked"})


def concept_kind(name: str, minicanvas: bool = False) -> str:
    """The kind that a concept's name suggests: "style", "object" or "nudity" ("instance" has to be asked for)."""
    words = _words(name)
    if minicanvas:
        from fastunlearn.minicanvas import vocabulary

        known = vocabulary.concept_kind(name)
        if known is not None:
            return known
    if words in NUDITY_NAMES:
        return "nudity"
    return "style" if words.endswith(" style") else "object"


def resolved_start(cfg: Config, kind: str) -> int:
    """First trained sampler index of a concept of this kind, on the scale of ``cfg.sampler.num_inference_steps``."""
    steps = cfg.sampler.num_inference_steps
    start = cfg.kscu.start if cfg.kscu.start is not None else KSCU_DEFAULTS[kind].start
    return min(scale_start(start, steps), math.ceil(0.9 * steps) - 1)


def resolved_steps(cfg: Config) -> int:
    """Number of updates: the given one, or the largest default among the concepts."""
    if cfg.train.max_train_steps is not None:
        return cfg.train.max_train_steps
    if cfg.closed_form and cfg.has_meta:
        return META_STEPS
    if cfg.method in METHOD_STEPS:
        return METHOD_STEPS[cfg.method]
    rows = [KSCU_DEFAULTS[cfg.kind_of(concept)] for concept in cfg.concepts]
    return max(row.steps if len(rows) == 1 else row.steps_for_several for row in rows)


def student_updates(cfg: Config) -> int:
    """How many of the run's updates change the model, over which its learning rate is planned: not DoCo's warm-up."""
    return resolved_steps(cfg) - first_student_update(cfg)


def first_student_update(cfg: Config) -> int:
    """The first update that changes the model: before it, only DoCo's discriminator learns."""
    return cfg.doco.discriminator_warmup if cfg.method == "doco" else 0


def resolved_scope(cfg: Config) -> str:
    """The trained scope: the given one, or that of ESD's variant, or that of the concepts' kinds (which must agree).

    Raises:
        UserError: concepts whose kinds train different scopes.
    """
    if cfg.train.scope != "auto":
        return cfg.train.scope
    if cfg.method == "esd":
        return ESD_SCOPES[cfg.esd.variant]
    if cfg.closed_form and cfg.has_meta:
        return "full"
    if cfg.method == "doco" or cfg.closed_form:
        return "attn2_kv"
    if cfg.method == "sdd":
        return "attn2"
    scopes = {concept.name: KSCU_DEFAULTS[cfg.kind_of(concept)].scope for concept in cfg.concepts}
    if len(set(scopes.values())) > 1:
        listing = ", ".join(f"{name!r} {scope}" for name, scope in scopes.items())
        raise UserError(
            f"train.scope: 'auto' is ambiguous, the concepts want different scopes ({listing}); "
            "set train.scope, or erase them in separate runs"
        )
    return next(iter(scopes.values()))


def resolved_keep(cfg: Config) -> list[str]:
    """The concepts to keep: the given ones, or on MiniCanvas, where all names are known, all that are not erased."""
    if cfg.keep or not cfg.uses_minicanvas:
        return list(cfg.keep)
    erased = {_identity(concept.name, True) for concept in cfg.concepts}
    return [name for name in _minicanvas_names() if _identity(name, True) not in erased]


def check_config(cfg: Config) -> None:
    """All refusals that need neither the disk nor the machine.

    Raises:
        UserError: the first rule that is broken.
    """
    _check_concepts(cfg)
    if cfg.uses_minicanvas:
        _check_minicanvas_names(cfg)
    resolved_scope(cfg)
    _check_prompts(cfg.prompts)
    check_engine(cfg)
    check_base_methods(cfg)
    _check_doco(cfg)
    _check_surgery(cfg)
    check_meta(cfg)
    _check_evaluation(cfg)
    if not cfg.output_dir.strip():
        raise UserError("output_dir: '' is empty; give the folder that receives the results")
    if cfg.overwrite_output_dir and cfg.resume_from_checkpoint is not None:
        raise UserError("overwrite_output_dir: true contradicts resume_from_checkpoint, which keeps that run; drop one")


def check_runtime(cfg: Config, world_size: int, cpu_count: int | None, has_gpu: bool) -> None:
    """Refuse what this machine cannot do; see ``Config.validate_runtime``."""
    cores = cpu_count if cpu_count is not None else len(os.sched_getaffinity(0))
    if world_size < 1:
        raise UserError(f"num_gpus: {world_size} ranks; at least 1 is needed")
    check_ranks(cfg, world_size)
    if not has_gpu and world_size > cores:
        raise UserError(
            f"num_gpus: {world_size} ranks are too many for {cores} CPU cores and no GPU; allowed are 1 to {cores}"
        )
    if not has_gpu and cfg.train.cpu_threads * world_size > cores:
        raise UserError(
            f"train.cpu_threads: {cfg.train.cpu_threads} on each of {world_size} ranks exceed {cores} CPU cores; "
            f"allowed are 0 (auto) to {cores // world_size}"
        )
    if cfg.model.cuda_graphs and not has_gpu:
        raise UserError("model.cuda_graphs: true, but there is no GPU; use false")
    dtype = "bf16" if cfg.model.mixed_precision == "bf16" else "fp32"
    refusal = attention_refusal(cfg.model.attention, "cuda" if has_gpu else "cpu", dtype)
    if refusal is not None:
        raise UserError(refusal)


def _words(name: str) -> str:
    return " ".join(name.lower().split())


def _identity(name: str, minicanvas: bool) -> str:
    """Equal for names of the same concept: "Neon" and "neon style", in MiniCanvas also "kitty" and "cat"."""
    if minicanvas:
        from fastunlearn.minicanvas import vocabulary

        return vocabulary.normalise_concept(name)
    return _words(name).removesuffix(" style")


def _check_concepts(cfg: Config) -> None:
    if not cfg.concepts:
        raise UserError('concepts: none given; name at least one, such as --concepts "neon style"')
    seen: dict[str, str] = {}
    for concept in cfg.concepts:
        if not concept.name.strip():
            raise UserError("concepts: '' is an empty concept; every concept needs a name")
        identity = _identity(concept.name, cfg.uses_minicanvas)
        if identity in seen:
            raise UserError(f"concepts: {concept.name!r} repeats {seen[identity]!r}; name each concept once")
        seen[identity] = concept.name
        if concept.anchor and _identity(concept.anchor, cfg.uses_minicanvas) == identity:
            raise UserError(f"concepts: anchor {concept.anchor!r} of {concept.name!r} is the concept itself")
    for name in cfg.keep:
        if not name.strip():
            raise UserError("keep: '' is an empty concept; every concept needs a name")
        identity = _identity(name, cfg.uses_minicanvas)
        if identity in seen:
            raise UserError(f"keep: {name!r} is also to be erased ({seen[identity]!r} in concepts); remove it from one")
    for name in cfg.prompts.contexts:
        if _identity(name, cfg.uses_minicanvas) in seen:
            raise UserError(f"prompts.contexts: {name!r} is also to be erased; a context must be kept")


def _minicanvas_names() -> list[str]:
    from fastunlearn.minicanvas import vocabulary

    return [f"{style} style" for style in vocabulary.STYLES] + list(vocabulary.OBJECTS)


def _check_minicanvas_names(cfg: Config) -> None:
    from fastunlearn.minicanvas import vocabulary

    named = [("concepts", concept.name) for concept in cfg.concepts] + [("keep", name) for name in cfg.keep]
    for field, name in named:
        if vocabulary.concept_kind(name) is None:
            raise UserError(
                f"{field}: {name!r} is not known to MiniCanvas; allowed are {', '.join(_minicanvas_names())}"
                + nearest(name, [*_minicanvas_names(), *vocabulary.STYLES])
            )


def _placeholders(field: str, template: str) -> set[str]:
    try:
        return {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError:
        raise UserError(f"{field}: {template!r} has unbalanced braces; write {{concept}} or {{context}}") from None


def _check_prompts(prompts: PromptsConfig) -> None:
    if not prompts.templates:
        raise UserError("prompts.templates: the list is empty; at least one template with {concept} is needed")
    if prompts.anchor_templates and len(prompts.anchor_templates) != len(prompts.templates):
        raise UserError(
            f"prompts.anchor_templates: {len(prompts.anchor_templates)} entries, but prompts.templates has "
            f"{len(prompts.templates)}; allowed are none, or one for each template"
        )
    for text in (text for text in prompts.contexts if not text.strip()):
        raise UserError(f"prompts.contexts: {text!r} is empty; every context needs words")
    for template in prompts.templates:
        names = _placeholders("prompts.templates", template)
        _refuse_unknown("prompts.templates", template, names, {"concept", "word", "context"})
        if not names & {"concept", "word"}:
            raise UserError(f"prompts.templates: {template!r} lacks {{concept}}; every template must name the concept")
        if "context" in names and not prompts.contexts:
            raise UserError(f"prompts.contexts: empty, but {template!r} needs it; list contexts or drop {{context}}")
    for template, removed in zip(prompts.templates, prompts.anchor_templates, strict=False):
        names = _placeholders("prompts.anchor_templates", removed)
        allowed = _placeholders("prompts.templates", template) - {"concept", "word"}
        _refuse_unknown("prompts.anchor_templates", removed, names, allowed)


def _refuse_unknown(field: str, template: str, names: set[str], allowed: set[str]) -> None:
    for name in sorted(names - allowed):
        listing = " and ".join(f"{{{known}}}" for known in sorted(allowed)) or "no placeholder"
        raise UserError(f"{field}: {template!r} holds {{{name}}}; allowed here: {listing}" + nearest(name, allowed))


def _check_surgery(cfg: Config) -> None:
    if cfg.surgery.projection == "released" and cfg.surgery.metric == "optimizer":
        raise UserError("surgery.metric: 'optimizer' has no form of the released projection; use 'raw' or 'textbook'")
    if not cfg.retains:
        return
    from fastunlearn.prompts.preserved import retain_prompts  # which knows Config

    source = cfg.retain_source
    if source == "folder" and cfg.retain.folder is None:
        raise UserError("retain.folder: none given; retain.source 'folder' needs images with captions")
    if source == "prompts" and cfg.retain.target == "noise":
        raise UserError("retain.target: 'noise' needs pictures; use 'teacher', or another retain.source")
    if source in ("generated", "prompts"):
        retain_prompts(cfg)


def _check_doco(cfg: Config) -> None:
    if cfg.method != "doco":
        return
    from fastunlearn.prompts.variants import concept_variants  # which knows Config

    for concept in cfg.concepts:
        if not any(variant.anchor for variant in concept_variants(concept, cfg.prompts)):
            raise UserError(
                f"concepts: {concept.name!r} has no anchor; method 'doco' draws pictures of what is to take its place, "
                "so give the concept an anchor, or prompts.anchor_templates"
            )
    if cfg.doco.timesteps == "key" and cfg.doco.min_timestep > 0:
        raise UserError(
            f"doco.min_timestep: {cfg.doco.min_timestep} is for uniform timesteps; key ones have an end of their own. "
            "Drop it, or set doco.timesteps to 'uniform'"
        )
    if student_updates(cfg) < 1:
        raise UserError(
            f"doco.discriminator_warmup: {cfg.doco.discriminator_warmup} leaves no update for the model; "
            f"train.max_train_steps is {resolved_steps(cfg)}"
        )


def _check_evaluation(cfg: Config) -> None:
    seeds = cfg.evaluation.seeds
    if len(set(seeds)) != len(seeds):
        raise UserError(f"evaluation.seeds: {seeds} repeats a seed; give distinct ones")
    for field in ("target_seeds", "retain_seeds"):
        count = getattr(cfg.evaluation, field)
        if count > len(seeds):
            raise UserError(f"evaluation.{field}: {count} exceeds the {len(seeds)} entries of evaluation.seeds")
