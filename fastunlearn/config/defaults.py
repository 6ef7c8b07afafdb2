"""Defaults that depend on method, concepts and model: what a field that was left open stands for in this run."""

from __future__ import annotations

from fastunlearn.config.base import RunConfig
from fastunlearn.prompts.vocabulary import GENERIC, MINICANVAS


def concept_kind(name: str, minicanvas: bool = False) -> str:
    """The kind that a concept's name suggests: "style", "object" or "nudity" ("instance" has to be asked for)."""
    return (MINICANVAS if minicanvas else GENERIC).kind_of(name)


def resolved_steps(cfg: RunConfig) -> int:
    """Number of updates: the given one, or the method's own for these concepts."""
    return cfg.max_train_steps


def first_student_update(cfg: RunConfig) -> int:
    """The first update that changes the model: before it, only what the method itself has to learn is trained."""
    return cfg.method_spec.first_student_update(cfg)


def student_updates(cfg: RunConfig) -> int:
    """How many of the run's updates change the model, over which its learning rate is planned."""
    return resolved_steps(cfg) - first_student_update(cfg)


def resolved_scope(cfg: RunConfig) -> str:
    """The trained scope: the given one, or the method's own for these concepts.

    Raises:
        UserError: concepts whose kinds train different scopes.
    """
    if cfg.train.scope != "auto":
        return cfg.train.scope
    if cfg.closed_form and cfg.has_meta:
        return "full"
    return cfg.method_spec.default_scope(cfg)


def resolved_keep(cfg: RunConfig) -> list[str]:
    """The concepts to keep: the given ones, or on MiniCanvas, where all names are known, all that are not erased."""
    known = cfg.vocabulary.known_names()
    if cfg.keep or known is None:
        return list(cfg.keep)
    identity = cfg.vocabulary.identity
    erased = {identity(concept.name) for concept in cfg.concepts}
    return [name for name in known if identity(name) not in erased]
