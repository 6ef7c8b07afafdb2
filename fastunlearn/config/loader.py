"""Text in and out of a configuration: TOML, command-line overrides, one-line errors, and the listing for ``--help``.

Everything is derived from the pydantic schema that the caller passes, so that a new field needs no entry here. No field
is known by name, except for diffusers' names in ``ALIASES``.
"""

from __future__ import annotations

import json
import reprlib
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fastunlearn.errors import UserError, nearest

# diffusers' names where the meaning is the same; those in ``SWITCHES`` stand for one value of the field.
ALIASES = {
    "pretrained_model_name_or_path": "model.pretrained_model_name_or_path",
    "revision": "model.revision",
    "variant": "model.variant",
    "mixed_precision": "model.mixed_precision",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "enable_xformers_memory_efficient_attention": "model.attention",
    "max_train_steps": "train.max_train_steps",
    "train_batch_size": "train.train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "learning_rate": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler",
    "lr_warmup_steps": "train.lr_warmup_steps",
    "max_grad_norm": "train.max_grad_norm",
    "resolution": "train.resolution",
    "use_8bit_adam": "optimizer.name",
    "adam_beta1": "optimizer.adam_beta1",
    "adam_beta2": "optimizer.adam_beta2",
    "adam_epsilon": "optimizer.adam_epsilon",
    "adam_weight_decay": "optimizer.adam_weight_decay",
    "num_inference_steps": "sampler.num_inference_steps",
    "guidance_scale": "sampler.guidance_scale",
    "zero_stage": "zero.stage",
    "checkpointing_steps": "checkpoint.checkpointing_steps",
    "checkpoints_total_limit": "checkpoint.checkpoints_total_limit",
    "report_to": "report.report_to",
    "validation_prompt": "report.validation_prompts",
    "num_validation_images": "report.num_validation_seeds",
}
SWITCHES = {
    "use_8bit_adam": {True: "adamw8bit", False: "adamw"},
    "enable_xformers_memory_efficient_attention": {True: "xformers", False: "auto"},
}
IGNORED = ("local_rank",)  # DeepSpeed's launcher appends it; the rank is read from the environment
BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}

TRAIN_USAGE = """usage: fastunlearn train [--preset NAME | --config FILE] [--num_gpus N] [--section.field VALUE ...]
       deepspeed [--num_gpus N] fastunlearn/train.py [--preset NAME | --config FILE] [--section.field VALUE ...]

Erase concepts from a Stable Diffusion or SDXL model. A list is written "a; b", a missing value none."""

Schema = type[BaseModel]


def fields_of(schema: Schema, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf field with its dotted name, in the order of the schema."""
    for name, info in schema.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from fields_of(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def read_toml(path: str) -> dict[str, Any]:
    """Parse a TOML file; every failure is a ``UserError`` that names the file."""
    file = Path(path).expanduser()
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = [entry.name for entry in file.parent.glob("*.toml")] if file.parent.is_dir() else []
        raise UserError(f"--config: {path!r} does not exist{nearest(file.name, known)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config: {path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--config: {path!r} is not valid TOML: {error}") from None


def take_option(arguments: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Take ``--name VALUE`` or ``--name=VALUE`` out of the arguments: (the last value or None, the other arguments)."""
    value, rest, words = None, [], list(arguments)
    while words:
        word = words.pop(0)
        if word == f"--{name}":
            value = _take_value(name, words, switch=False)
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


def merge(data: dict[str, Any], flat: dict[str, Any]) -> None:
    """Write ``{"train.scope": "full"}`` into the nested ``data``, in place."""
    for dotted, value in flat.items():
        *sections, leaf = dotted.split(".")
        target = data
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise UserError(f"{section}: {target!r} is not a section; write [{section}] in the TOML file")
        target[leaf] = value


def parse_overrides(arguments: Sequence[str], schema: Schema) -> dict[str, Any]:
    """Read ``--section.field value``, ``--section.field=value`` and diffusers' names into ``{dotted name: value}``.

    A value that does not fit its field's type is left as text, so that validation reports it together with what is
    allowed. A later argument wins over an earlier one.

    Raises:
        UserError: an unknown option, a word that belongs to no option, or a missing value.
    """
    fields = dict(fields_of(schema))
    result: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f'{word!r}: unexpected argument; write --section.field value (a list as "a; b")')
        name, separator, text = word[2:].partition("=")
        name = name.replace("-", "_")
        dotted = ALIASES.get(name, name)
        if dotted not in fields and name not in IGNORED:
            raise UserError(f"--{name}: unknown option{_nearest_option(name, fields)}")
        switch = name in SWITCHES or (dotted in fields and fields[dotted].annotation is bool)
        if not separator:
            text = _take_value(name, rest, switch)
        if name not in IGNORED:
            result[dotted] = _alias_value(name, text, fields[dotted])
    return result


def _take_value(name: str, rest: list[str], switch: bool) -> str:
    if switch:
        return rest.pop(0) if rest and rest[0].lower() in BOOLEANS else "true"
    if not rest or rest[0].startswith("--"):
        raise UserError(f"--{name}: a value is missing; write --{name} VALUE")
    return rest.pop(0)


def _alias_value(name: str, text: str, info: FieldInfo) -> Any:
    if name in SWITCHES:
        if text.lower() not in BOOLEANS:
            raise UserError(f"--{name}: {text!r} is not true or false")
        return SWITCHES[name][BOOLEANS[text.lower()]]
    if name == "validation_prompt":  # one prompt, which may hold a semicolon
        return [text]
    return convert(text, info.annotation)


def convert(text: str, annotation: Any) -> Any:
    """Read ``text`` as a value of this type; text that does not fit comes back unchanged."""
    options = set(get_args(annotation))
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    if get_origin(annotation) is list:
        return _convert_list(text, get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        readings = {str(option).lower(): option for option in get_args(annotation)}
        return readings.get(text.lower(), text)
    if annotation is bool:
        return BOOLEANS.get(text.lower(), text)
    if annotation is str or str in options:
        return text
    return _convert_number(text)


def _convert_number(text: str) -> Any:
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return int(number) if isinstance(number, float) and number.is_integer() else number
    return text


def _convert_list(text: str, item: Any) -> Any:
    if text.lstrip().startswith("["):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            return text
    parts = [part.strip() for part in text.split(";")]
    if parts[-1] == "":  # "" is the empty list, and "a;" is one item
        parts.pop()
    is_text = item is str or (isinstance(item, type) and issubclass(item, BaseModel))
    return parts if is_text else [_convert_number(part) for part in parts]


def _nearest_option(name: str, fields: dict[str, FieldInfo]) -> str:
    by_leaf = {dotted.rpartition(".")[2]: dotted for dotted in fields}
    leaf = name.rpartition(".")[2]
    if leaf in by_leaf:  # the right field in the wrong section
        return f" (nearest: --{by_leaf[leaf]})"
    found = nearest(name, [*fields, *ALIASES])
    if not found:
        found = nearest(leaf, by_leaf)
    return found.replace("nearest: ", "nearest: --")


def one_line(error: ValidationError, schema: Schema) -> UserError:
    """The first problem that pydantic found, as one line that names field, value and what is allowed."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    field = _dotted(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return UserError(f"{field}: unknown field{_nearest_field(problem['loc'], schema)}")
    if problem["type"] == "missing":
        return UserError(f"{field}: missing; it has no default")
    annotation = fields[field].annotation if field in (fields := dict(fields_of(schema))) else None
    return UserError(f"{field}: {reprlib.repr(problem['input'])} is not allowed; {_allowed(problem, annotation)}")


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _allowed(problem: Any, annotation: Any) -> str:
    limits = problem.get("ctx", {})
    if problem["type"] == "greater_than" and _is_whole_number(annotation):
        return f"it must be at least {limits['gt'] + 1}"
    texts = {
        "int_type": "a whole number is needed",
        "float_type": "a number is needed",
        "finite_number": "a finite number is needed",
        "bool_type": "true or false is needed",
        "string_type": "text in quotes is needed",
        "list_type": 'a list is needed, such as ["a", "b"]',
        "model_type": "a section with fields is needed" if len(problem["loc"]) == 1 else "a name or a table is needed",
        "too_short": "at least {min_length} entry is needed",
        "literal_error": "allowed are {expected}",
        "greater_than": "it must be greater than {gt}",
        "greater_than_equal": "it must be at least {ge}",
        "less_than": "it must be less than {lt}",
        "less_than_equal": "it must be at most {le}",
        "multiple_of": "it must be a multiple of {multiple_of}",
    }
    text = texts[problem["type"]].format(**limits) if problem["type"] in texts else str(problem["msg"])
    if problem["type"] == "literal_error" and isinstance(problem["input"], str):
        text += nearest(problem["input"], limits["expected"].replace("'", "").replace(" or ", ", ").split(", "))
    return text.replace("True", "true").replace("False", "false")


def _is_whole_number(annotation: Any) -> bool:
    return annotation is int or any(_is_whole_number(part) for part in get_args(annotation))


def _nearest_field(location: tuple[int | str, ...], schema: Schema) -> str:
    fields = dict(fields_of(schema))
    *parents, leaf = [str(part) for part in location if not isinstance(part, int)]
    if parents == ["concepts"]:
        return nearest(leaf, ("name", "anchor", "kind"))
    prefix = "".join(f"{parent}." for parent in parents)
    siblings = [name.removeprefix(prefix).partition(".")[0] for name in fields if name.startswith(prefix)]
    found = nearest(leaf, siblings)
    if found:
        return found.replace("nearest: ", f"nearest: {prefix}")
    return _nearest_option(prefix + leaf, fields).replace("nearest: --", "nearest: ")


def emit_toml(data: dict[str, Any]) -> str:
    """TOML of nested plain values; None, which TOML does not have, is left out. ``tomllib`` reads it back equal."""
    return tomli_w.dumps(_without_none(data))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def train_help(schema: Schema) -> str:
    """What ``fastunlearn train --help`` prints."""
    return f"{TRAIN_USAGE}\n\noptions (in TOML: field = value under [section]):\n{options_help(schema)}"


def options_help(schema: Schema) -> str:
    """One line per option: name, type or choices, default, and the field's docstring."""
    aliases: dict[str, list[str]] = {}
    for alias, dotted in ALIASES.items():
        aliases.setdefault(dotted, []).append(f"--{alias}")
    lines = []
    for dotted, info in fields_of(schema):
        value = info.get_default(call_default_factory=True)
        default = "none" if value is None else json.dumps(value, ensure_ascii=False)
        lines.append(f"  --{dotted} {_type_name(info.annotation)} (default {default})")
        also = f" Also {', '.join(aliases[dotted])}." if dotted in aliases else ""
        lines.append(f"      {info.description}{also}")
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(str(option).lower() for option in get_args(annotation))
    if get_origin(annotation) is list:
        return '"A; B; ..."'
    names = {str: "TEXT", int: "N", float: "X", bool: "true|false"}
    kinds = [kind for kind in (get_args(annotation) or [annotation]) if kind is not type(None)]
    return next((names[kind] for kind in names for option in kinds if kind in (option, *get_args(option))), "VALUE")
