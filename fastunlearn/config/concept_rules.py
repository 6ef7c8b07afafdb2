"""Refusals that span several fields: concepts, prompts, surgery, evaluation; and what this machine cannot do.

Rules of a method or an engine are in its own file, those of the meta term in ``meta_rules.py``.
"""

from __future__ import annotations

import os
from string import Formatter

from fastunlearn.config.base import RunConfig, resolved_keep, resolved_scope
from fastunlearn.config.engine_rules import check_engine, check_ranks
from fastunlearn.config.meta_rules import check_meta
from fastunlearn.config.run_prompts import retain_prompts
from fastunlearn.errors import UserError, nearest
from fastunlearn.registry import FORMATS
from fastunlearn.schema.attention_rules import attention_refusal
from fastunlearn.schema.sections import PromptsConfig


def check_config(cfg: RunConfig) -> None:
    """All refusals that need neither the disk nor the machine.

    Raises:
        UserError: the first rule that is broken.
    """
    _check_concepts(cfg)
    _check_known_names(cfg)
    resolved_scope(cfg)
    _check_prompts(cfg.prompts)
    check_engine(cfg)
    cfg.method_spec.refuse(cfg)
    _check_surgery(cfg)
    check_meta(cfg)
    _check_evaluation(cfg)
    for name, written in FORMATS.items():
        if written.read_by and name not in cfg.export.formats:
            listed = ", ".join(cfg.export.formats)
            raise UserError(f"export.formats: {listed} lacks {name!r}, which {written.read_by} read; add it")
    if not cfg.output_dir.strip():
        raise UserError("output_dir: '' is empty; give the folder that receives the results")
    if cfg.overwrite_output_dir and cfg.resume_from_checkpoint is not None:
        raise UserError("overwrite_output_dir: true contradicts resume_from_checkpoint, which keeps that run; drop one")


def said_back(cfg: RunConfig) -> str:
    """What is erased, as the run has understood it: "2 concepts: cat (object, anchor: dog); neon style (style)"."""
    anchors = [f", anchor: {concept.anchor}" if concept.anchor else "" for concept in cfg.concepts]
    names = [f"{c.name} ({cfg.kind_of(c)}{anchor})" for c, anchor in zip(cfg.concepts, anchors, strict=True)]
    said = f"{len(names)} concept{'s' if len(names) != 1 else ''}: {'; '.join(names)}"
    said += "".join(
        f"\n{concept.name!r} is taken as an object; an artist is {concept.name + ' style'!r}, a person or a character "
        f'{{name = "{concept.name}", kind = "instance"}}'
        for concept in cfg.concepts
        if concept.kind == "auto" and cfg.kind_of(concept) == "object" and concept.name[:1].isupper()
    )
    return said if cfg.chooses_neighbours or not cfg.protects_unasked else f"{said}\n{held(cfg)}"


def held(cfg: RunConfig) -> str:
    """What the retain gradient holds without having been asked for, and how to leave it out."""
    return f"held by the retain gradient: {'; '.join(resolved_keep(cfg))} (--surgery.enabled false leaves it out)"


def check_runtime(cfg: RunConfig, world_size: int, cpu_count: int | None, has_gpu: bool) -> None:
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
    dtype = cfg.compute_dtype
    refusal = attention_refusal(cfg.model.attention, "cuda" if has_gpu else "cpu", dtype)
    if refusal is not None:
        raise UserError(refusal)


def _check_concepts(cfg: RunConfig) -> None:
    if not cfg.concepts:
        raise UserError('concepts: none given; name at least one, such as --concepts "neon style"')
    seen: dict[str, str] = {}
    identity_of = cfg.vocabulary.identity
    for concept in cfg.concepts:
        if not concept.name.strip():
            raise UserError("concepts: '' is an empty concept; every concept needs a name")
        identity = identity_of(concept.name)
        if identity in seen:
            raise UserError(f"concepts: {concept.name!r} repeats {seen[identity]!r}; name each concept once")
        seen[identity] = concept.name
        if concept.anchor and identity_of(concept.anchor) == identity:
            raise UserError(f"concepts: anchor {concept.anchor!r} of {concept.name!r} is the concept itself")
    for name in cfg.keep:
        if not name.strip():
            raise UserError("keep: '' is an empty concept; every concept needs a name")
        identity = identity_of(name)
        if identity in seen:
            raise UserError(f"keep: {name!r} is also to be erased ({seen[identity]!r} in concepts); remove it from one")
    for name in cfg.prompts.contexts:
        if identity_of(name) in seen:
            raise UserError(f"prompts.contexts: {name!r} is also to be erased; a context must be kept")


def _check_known_names(cfg: RunConfig) -> None:
    known = cfg.vocabulary.known_names()
    if known is None:
        return
    identities = {cfg.vocabulary.identity(name) for name in known}
    named = [("concepts", concept.name) for concept in cfg.concepts] + [("keep", name) for name in cfg.keep]
    for field, name in named:
        if cfg.vocabulary.identity(name) not in identities:
            raise UserError(
                f"{field}: {name!r} is not known to MiniCanvas; allowed are {', '.join(known)}"
                + nearest(name, cfg.vocabulary.nearest_among())
            )


def _placeholders(field: str, template: str) -> set[str]:
    try:
        return {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError:
        raise UserError(f"{field}: {template!r} has unbalanced braces; write {{concept}} or {{context}}") from None


def _check_prompts(prompts: PromptsConfig) -> None:
    if prompts.anchor_templates and not prompts.templates:
        raise UserError(
            "prompts.anchor_templates: given, but no prompts.templates that they could belong to; give both"
        )
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


def _check_surgery(cfg: RunConfig) -> None:
    if cfg.surgery.projection == "released" and cfg.surgery.metric == "optimizer":
        raise UserError("surgery.metric: 'optimizer' has no form of the released projection; use 'raw' or 'textbook'")
    if not cfg.retains:
        return
    source = cfg.retain_source
    if source == "folder" and cfg.retain.folder is None:
        raise UserError("retain.folder: none given; retain.source 'folder' needs images with captions")
    if source == "prompts" and cfg.retain.target == "noise":
        raise UserError("retain.target: 'noise' needs pictures; use 'teacher', or another retain.source")
    if source in ("generated", "prompts") and not cfg.chooses_neighbours:
        retain_prompts(cfg)


def _check_evaluation(cfg: RunConfig) -> None:
    seeds = cfg.evaluation.seeds
    if len(set(seeds)) != len(seeds):
        raise UserError(f"evaluation.seeds: {seeds} repeats a seed; give distinct ones")
    for field in ("target_seeds", "retain_seeds"):
        count = getattr(cfg.evaluation, field)
        if count > len(seeds):
            raise UserError(f"evaluation.{field}: {count} exceeds the {len(seeds)} entries of evaluation.seeds")
