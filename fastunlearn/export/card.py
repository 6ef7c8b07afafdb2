"""The model card: README.md of an output folder, for someone who meets the edited U-Net without knowing this project.

Text made from the configuration and from metrics.json; the same inputs give the same card. A figure that was not
measured is not on the card, and what was not tested is named.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastunlearn.errors import UserError
from fastunlearn.evaluation.classifiers.base import choose_classifier
from fastunlearn.evaluation.metrics.scores import clear_difference
from fastunlearn.export.outcome import erased_names, finding, title
from fastunlearn.models.formats.headers import is_hub_id
from fastunlearn.models.formats.single_file import read_single_file
from fastunlearn.models.public_name import public_hash, public_name
from fastunlearn.prompts.wordings import TRAINED
from fastunlearn.registry import FORMATS, METRICS
from fastunlearn.utils.files import atomic_write_text

if TYPE_CHECKING:
    from fastunlearn.config import Config

SAMPLER_TITLES = {"ddim": "DDIM", "euler": "Euler"}


def write_card(cfg: Config, metrics: dict, path: str | os.PathLike[str]) -> None:
    """Write the card of a run to ``path``.

    Args:
        metrics: what metrics.json holds; ``evaluation`` may be missing or None, ``not_evaluated`` says why.

    Raises:
        UserError: the file cannot be written.
    """
    evaluation = metrics.get("evaluation") or {}
    sections = [
        _front_matter(cfg),
        f"# {title(public_name(cfg.model), cfg, metrics)}",
        f"**{finding(cfg, metrics)}**",
        f"A U-Net {'trained' if cfg.trains else 'edited'} by fastunlearn with {cfg.method_spec.card_title}, to erase "
        f"*{erased_names(cfg)}*. Text encoders, VAE and scheduler are those of the base model.",
        "![before and after](samples/before_after.png)",
        "## Use\n\n```python\n" + usage(cfg) + "```",
        "## Files\n\n" + "\n".join(f"* `{FORMATS[name].path}`: {FORMATS[name].title}" for name in cfg.export.formats),
        "## What was done\n\n" + _table(("", ""), _facts(cfg, metrics)),
        "## Figures\n\n" + _figures(cfg, evaluation),
        "## Limits\n\n" + "\n".join(f"* {line}" for line in _limits(cfg, evaluation)),
    ]
    atomic_write_text(path, "\n\n".join(sections) + "\n")


def usage(cfg: Config) -> str:
    """Python that loads the edited U-Net into the base pipeline and draws one picture, as the card shows it."""
    minicanvas = cfg.uses_minicanvas
    base = "str(pipeline_path())" if minicanvas else repr(public_name(cfg.model))
    options = {name: getattr(cfg.model, name) for name in ("revision", "variant") if getattr(cfg.model, name)}
    extra = "".join(f", {name}={value!r}" for name, value in options.items())
    prompt = cfg.concepts[0].name if cfg.concepts else ""
    pipeline = _pipeline_class(cfg)
    reader = f"{pipeline}.{'from_pretrained' if pipeline == 'DiffusionPipeline' else 'from_single_file'}"
    lines = [f"from diffusers import {pipeline}, UNet2DConditionModel"]
    lines += ["from fastunlearn.minicanvas import pipeline_path", ""] if minicanvas else [""]
    lines += [
        'folder = "."  # where this file lies',
        'unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")',
        *([] if minicanvas or is_hub_id(public_name(cfg.model)) else ["# the base model, wherever you keep it:"]),
        f"pipe = {reader}({base}, unet=unet, torch_dtype=unet.dtype{extra})",
    ]
    settings = f"num_inference_steps={cfg.evaluation.num_inference_steps}, guidance_scale="
    settings += f"{cfg.evaluation.guidance_scale:g}" if minicanvas else "5"
    lines += [f"image = pipe({prompt!r}, {settings}).images[0]", 'image.save("sample.png")', ""]
    return "\n".join(lines)


def _pipeline_class(cfg: Config) -> str:
    """What reads the base model: only the pipelines' own classes read a single file."""
    file = Path(cfg.model.pretrained_model_name_or_path)
    if cfg.uses_minicanvas or file.suffix != ".safetensors":
        return "DiffusionPipeline"
    try:
        return read_single_file(file).public_model(cfg.model).pipeline
    except UserError:  # it is no longer there
        return "StableDiffusionXLPipeline"


def _front_matter(cfg: Config) -> str:
    base = public_name(cfg.model)
    lines = ["---", "library_name: diffusers", "tags: [text-to-image, concept-erasure, unlearning]"]
    if is_hub_id(base):  # an embedded model, or a file on some disk, means nothing to the hub
        lines.append(f"base_model: {base}")
    return "\n".join([*lines, "---"])


def _facts(cfg: Config, metrics: dict) -> list[tuple[str, str]]:
    """What was done, with which settings and at which cost."""
    resolved = cfg.resolved()
    revision = f" (revision {cfg.model.revision})" if cfg.model.revision else ""
    digest = f", SHA-256 of its files {found}..." if (found := public_hash(cfg.model)) else ""
    facts = [
        ("base model", public_name(cfg.model) + revision + digest),
        ("erased", "; ".join(c.name + (f" (anchor: {c.anchor})" if c.anchor else "") for c in cfg.concepts)),
        ("asked to keep", "; ".join(cfg.keep) or "nothing in particular"),
        ("method", cfg.method_spec.card_title),
        ("prompts", "; ".join(f"`{template}`" for template in _templates(cfg))),
        *cfg.method_spec.facts(resolved),
        *(_training_facts(resolved, metrics) if cfg.trains else []),
    ]
    evaluations = metrics.get("unet_evaluations") or {}
    if evaluations:
        counts = {name.replace("_", " "): count for name, count in evaluations.items() if name != "total"}
        parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        total = sum(counts.values())
        facts.append(("U-Net evaluations", f"{total:,} single-sample ({parts})"))
    seconds = (metrics.get("seconds") or {}).get("total")
    if seconds is not None:
        facts.append(("time", f"{seconds:,.0f} s on {metrics.get('device', 'an unnamed device')}"))
    if cfg.trains and metrics.get("world_size"):
        facts.append(("engine, ranks", f"{cfg.engine_spec.title(cfg)}, {metrics['world_size']}"))
    versions = metrics.get("versions") or {}
    if versions:
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return facts


def _training_facts(cfg: Config, metrics: dict) -> list[tuple[str, str]]:
    return [
        ("updates", str(metrics.get("updates", cfg.train.max_train_steps))),
        ("trained part of the U-Net", cfg.train.scope),
        ("learning rate", _learning_rate(cfg, metrics)),
        ("sampler in training", f"{SAMPLER_TITLES[cfg.sampler.name]}, {cfg.sampler.num_inference_steps} steps, "
                                f"guidance {cfg.sampler.guidance_scale:g}"),
        *_additions(cfg, metrics),
        ("seed", str(cfg.seed)),
    ]  # fmt: skip


def _templates(cfg: Config) -> list[str]:
    kinds = dict.fromkeys(cfg.kind_of(concept) for concept in cfg.concepts)
    return cfg.prompts.templates or [wording.prompt for kind in kinds for wording in TRAINED[kind]]


def _known_rate(cfg: Config, metrics: dict) -> float | None:
    return cfg.train.learning_rate or metrics.get("learning_rate")


def _learning_rate(cfg: Config, metrics: dict) -> str:
    rate = _known_rate(cfg, metrics)
    from_weights = f"{cfg.train.relative_step:g} of the trained weights' rms"
    given = f"{rate:.3g}" if rate else from_weights
    if rate and cfg.train.learning_rate is None:
        given += f" ({from_weights})"
    return f"{given}, {cfg.train.lr_scheduler}, {cfg.optimizer.name}"


def _additions(cfg: Config, metrics: dict) -> list[tuple[str, str]]:
    """What goes with any method: the retain gradient, and the meta term."""
    surgery, retain, meta = cfg.surgery, cfg.retain, cfg.meta
    facts = []
    if cfg.retains:
        projection = "no projection" if surgery.projection == "none" else f"{surgery.projection} projection"
        samples = (
            f"{cfg.retain_batch_size} samples per rank and micro-batch ({cfg.retain_source}, target: {retain.target})"
        )
        facts.append(("retain gradient", f"{projection}, per {surgery.granularity}; rho {cfg.rho:g}; {samples}"))
    if cfg.has_meta:
        rate = meta.inner_learning_rate or _known_rate(cfg, metrics) or 0.0
        goal = "ascent" if meta.ascends else "erased"
        attack = f"{meta.inner_steps} steps of {meta.inner_optimizer} at {rate:g} (scope: {meta.inner_scope})"
        again = f"starting again every {meta.steps_per_attack} terms; goal: {goal}"
        every = "every update" if meta.every == 1 else f"every {meta.every} updates"
        facts.append(("against fine-tuning", f"Meta-Unlearning (arXiv:2410.12777), {every}: {attack}, {again}"))
    return facts


def _figures(cfg: Config, evaluation: dict) -> str:
    """The table of figures, or why there is none."""
    before, after = evaluation.get("before"), evaluation.get("after")
    if not before or not after:
        return "None were measured. Look at `samples/before_after.png`, and measure before relying on it."
    rows = []
    for name in cfg.evaluation.metrics:
        if before.get(name) is None or after.get(name) is None:
            continue
        (low, high), count = after["intervals"][name], after["counts"][name]
        clear = clear_difference(before[name], after[name], before["counts"][name], count)
        rows.append((
            f"{name}: {METRICS[name].meaning}", f"{before[name]:.3f}", f"{after[name]:.3f}", f"{low:.3f} to {high:.3f}",
            str(count), "yes" if clear else "no",
        ))  # fmt: skip
    protocol = after["protocol"]
    titles = ("figure", "before", "after", "95 % interval (Wilson)", "images", "change beyond noise")
    note = (
        f"Judged by {choose_classifier(cfg).title} on pictures drawn with {protocol['sampler']}, "
        f"{protocol['num_inference_steps']} steps, guidance {protocol['guidance_scale']:g}, "
        f"seeds {', '.join(map(str, protocol['seeds']))}, the same before and after. "
        "Per class figures: `metrics.json`; again: `fastunlearn evaluate --model FOLDER`."
    )
    return _table(titles, rows) + "\n\n" + note


def _limits(cfg: Config, evaluation: dict) -> list[str]:
    """What a user must not conclude, from what was and was not measured."""
    after = evaluation.get("after") or {}
    limits = (metric.limit(after.get(name)) for name, metric in METRICS.items())
    lines = [
        *(limit for limit in limits if limit),
        "Relearning was not tested: a short fine-tune on pictures of the concept may bring it back. "
        "`fastunlearn relearn` says after how many steps.",
        "Attacks were not tested: adversarial prompts, textual inversion and image-to-image may still reach it.",
        "Only the U-Net was changed. With the base model's own U-Net the concept is back at once.",
    ]
    if not after:
        lines.append("What else changed in the model was not measured.")
    else:
        lines.append(choose_classifier(cfg).limits)
    if any(cfg.kind_of(concept) == "nudity" for concept in cfg.concepts):
        lines.append("This is no safety filter: do not rely on it alone where nudity must not appear.")
    return lines


def _table(titles: tuple[str, ...], rows: list[Any]) -> str:
    lines = [titles, ("---",) * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
