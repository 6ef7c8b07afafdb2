"""What a row of the benchmark is: short names for what is swept, their product, and the configuration behind them.

``scope=attn2,full batch=1,4`` as text, as rows, and as a ``Config``. A name with a dot is a field of the configuration
itself (``model.compile=no,regional``), so a lever that the trainer gains can be swept at once. Nothing here touches a
model.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from fastunlearn.config import Config
from fastunlearn.config.loader import merge, one_line
from fastunlearn.config.options import parse_overrides
from fastunlearn.errors import UserError, nearest

Row = dict[str, str]

DEFAULTS: Row = {
    "model": "minicanvas", "kind": "style", "method": "kscu", "baseline": "ours", "engine": "zero", "surgery": "off",
    "meta": "off", "ranks": "1", "batch": "1", "precision": "auto", "checkpointing": "false", "attention": "auto",
    "scope": "auto", "cap": "none", "profile": "false", "whole": "false",
}  # fmt: skip
# Only where they are given: what is left out is the configuration's own default.
OPTIONAL = {"resolution": "train.resolution", "stage": "zero.stage", "optimizer": "optimizer.name"}
ALLOWED = {
    "kind": ("style", "object"),
    "surgery": ("off", "auto", "fp32", "bf16", "int8", "loop"),
    "meta": ("off", "on", "published", "copy"),
    "precision": ("auto", "published", "bf16", "no"),
    "checkpointing": ("true", "false"),
    "profile": ("true", "false"),
    "whole": ("true", "false"),
}
OF_OURS = ("engine", "stage", "surgery", "meta", "ranks", "optimizer", "method")
"""What a baseline fixes itself."""
REPLACED = {"surgery": "loop", "meta": "copy"}
"""Values for which one part of the trainer is done the published way (``baselines/``), on whole gradients."""
# Ascent after a fresh attack of three steps, with the losses on what is kept as differences.
PUBLISHED_META = {
    "forbidden_loss": "ascent", "negative_guidance": 0, "forbidden_weight": 0.1, "restart_every": 1, "inner_steps": 3,
}  # fmt: skip
CONCEPTS = {"style": "neon style", "object": "cat"}
ANCHORS = {"style": "ink style", "object": "car"}
KEPT = ["a house", "a fish in ink style", "a photograph of a tree", "a boat on a lake"]


def parse_sweep(groups: Sequence[Sequence[str]], fixed: Mapping[str, str]) -> list[Row]:
    """The rows of all groups, each the product of its ``name=value,value``; the same row twice counts once.

    Raises:
        UserError: an unknown name, or a value that is not allowed.
    """
    rows: dict[str, Row] = {}
    for group in groups or [[]]:
        axes = dict(_axis(entry) for entry in group)
        for values in itertools.product(*axes.values()):
            row = normal({**fixed, **dict(zip(axes, values, strict=True))})
            rows.setdefault(identity(row), row)
    return list(rows.values())


def _axis(entry: str) -> tuple[str, list[str]]:
    name, equals, values = entry.partition("=")
    known = [*DEFAULTS, *OPTIONAL]
    if not equals or not values:
        raise UserError(f"--sweep: {entry!r} is not name=value,value")
    if name not in known and "." not in name:
        raise UserError(f"--sweep: {name!r} is unknown; allowed are {', '.join(known)} and fields such as model.compile"
                        + nearest(name, known))  # fmt: skip
    chosen = [value.strip() for value in values.split(",")]
    for value in chosen:
        if value not in ALLOWED.get(name, (value,)):
            raise UserError(f"--sweep: {name}={value}; allowed are {', '.join(ALLOWED[name])}")
        if name in ("batch", "resolution", "stage", "ranks") and not value.isdecimal():
            raise UserError(f"--sweep: {name}={value}; a whole number is needed")
        if name == "ranks" and int(value) < 1:
            raise UserError(f"--sweep: ranks={value}; at least 1 is needed")
        if name == "cap" and value != "none" and not _is_positive(value):
            raise UserError(f"--sweep: cap={value}; allowed are none, or GiB such as 12")
    return name, chosen


def _is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def normal(row: Mapping[str, str]) -> Row:
    """With defaults, and without what means nothing to it: ZeRO's stage to the fused engine, ours to a baseline."""
    full = {**DEFAULTS, **row}
    if full["baseline"] != "ours":
        full = {name: value for name, value in full.items() if name not in OF_OURS}
    elif full["engine"] == "fused":
        full.pop("stage", None)
    return full


def identity(row: Mapping[str, str]) -> str:
    """The same for rows that measure the same."""
    return json.dumps(dict(row), sort_keys=True)


def title(row: Mapping[str, str]) -> str:
    """What distinguishes a row from the defaults, for progress lines."""
    said = [f"{name}={value}" for name, value in row.items() if DEFAULTS.get(name) != value]
    return " ".join(said) or "defaults"


def replaces(row: Mapping[str, str]) -> bool:
    """Whether a part of the trainer is done the published way in this row.

    Raises:
        UserError: that part needs whole gradients, and this row shards or never has them.
    """
    found = [f"{name}={value}" for name, value in REPLACED.items() if row.get(name) == value]
    if found and (row["engine"], row.get("stage", "0"), row["ranks"]) != ("zero", "0", "1"):
        raise UserError(f"{found[0]}: needs whole gradients, that is engine=zero, stage=0 and ranks=1")
    return bool(found)


def config_of(row: Mapping[str, str], has_gpu: bool, *, short: bool) -> Config:
    """The configuration of a row. ``short``: as it is measured, with a pool of pictures that takes no time to draw;
    otherwise the run that a user would start, whose evaluations are counted.

    Raises:
        UserError: the trainer refuses it.
    """
    data = _sections(row, has_gpu)
    data["progress"] = {"enabled": False}  # what an update costs, and as many of them as others make
    if short:
        data["retain"] |= {"num_images": int(row["batch"]), "num_inference_steps": 2}
        data["doco"] = {"discriminator_warmup": 0}
        data["teacher"] = {"trajectories": int(row["batch"])}
        if "meta" in data:
            data["meta"]["num_images"] = 8
    given = {OPTIONAL.get(name, name): value for name, value in row.items() if name in OPTIONAL or "." in name}
    options = [part for name, value in given.items() for part in (f"--{name}", value)]
    merge(data, parse_overrides(options, Config))
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise one_line(error, Config) from None


def _sections(row: Mapping[str, str], has_gpu: bool) -> dict[str, Any]:
    """What the short names of a row say, by sections of the configuration."""
    kind, surgery, meta = row["kind"], row.get("surgery", "off"), row.get("meta", "off")
    precision = ("bf16" if has_gpu else "no") if row["precision"] in ("auto", "published") else row["precision"]
    data: dict[str, Any] = {
        "concepts": [{"name": CONCEPTS[kind], "anchor": ANCHORS[kind] if row.get("method") == "doco" else "",
                      "kind": kind}],
        "method": row.get("method", "kscu"),
        "engine": row.get("engine", "zero"),
        "model": {
            "pretrained_model_name_or_path": row["model"], "mixed_precision": precision,
            "attention": row["attention"], "gradient_checkpointing": row["checkpointing"] == "true",
        },
        "train": {"train_batch_size": int(row["batch"]), "scope": row["scope"], "cpu_threads": 1},
        "retain": {"batch_size": int(row["batch"]), "neighbours": 0},
        "report": {"report_to": "none"},
        "sampler": {"num_inference_steps": 50},  # and the starts of the paper, as the baselines have them
        "kscu": {"start": "published"},
    }  # fmt: skip
    data["surgery"] = {"enabled": False}
    if surgery != "off":
        data["surgery"] = {"enabled": True, "retain_dtype": "auto" if surgery == "loop" else surgery}
    if meta != "off":
        data["meta"] = {"enabled": True} | (PUBLISHED_META if meta != "on" else {})
    if row["baseline"] == "ours" and replaces(row):
        data["zero"] = {"stage": 0}
    if row["model"] != "minicanvas":
        data["retain"]["prompts"] = KEPT
        if "meta" in data:
            data["meta"] |= {"related_prompts": KEPT[:2], "unrelated_prompts": KEPT[2:]}
    return data
