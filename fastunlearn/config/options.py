"""The command line of a configuration: every field is an option of argparse, and so is every alias.

    given = Options(ArgumentParser(prog="fastunlearn train"), Config).read(["--train.scope", "full"])
    given == {"train.scope": "full"}

Everything follows from the pydantic schema that the caller passes, so that a new field needs no entry here. No field is
known by name, except for diffusers' names in ``ALIASES``.
"""

from __future__ import annotations

import textwrap
from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fastunlearn.config.field_help import Formatter, field_text, option_type, plain_type
from fastunlearn.errors import UserError, nearest, nearest_name
from fastunlearn.utils.foreign import Unreadable, parse_toml

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
IGNORED = "local_rank"  # DeepSpeed's launcher appends it; the rank is read from the environment
BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
TOP = "run"
"""What help calls the section of the fields that stand in none."""

Schema = type[BaseModel]


@dataclass(frozen=True)
class Option:
    """An option that a command has besides the fields. A ``switch`` may go without a value, which is then true."""

    name: str
    help: str
    metavar: str = "VALUE"
    switch: bool = False


class Options:
    """What a command line may say of a configuration, and the command's own options.

    argparse holds the options, reads their values and formats the help. That an option's value is the next word is
    settled before, in ``joined``: argparse takes "-1e-5" for an option, and any word after a switch for its value.
    """

    def __init__(self, parser: ArgumentParser, schema: Schema, own: Sequence[Option] = ()) -> None:
        self.parser, self.fields, self.sections = parser, dict(fields_of(schema)), sections_of(schema)
        self.switches = {IGNORED: False} | {option.name: option.switch for option in own}
        self.switches |= {name: info.annotation is bool for name, info in self.fields.items()}
        self.switches |= {name: name in SWITCHES or self.switches[field] for name, field in ALIASES.items()}
        shown = [f"[--{option.name}]" if option.switch else f"[--{option.name} {option.metavar}]" for option in own]
        parser.usage = f"%(prog)s {' '.join(shown)} [--section.field VALUE ...]\n       %(prog)s --help [SECTION]"
        parser.formatter_class = Formatter
        parser.epilog = textwrap.fill("sections: " + ", ".join(self.sections), 100)
        parser.add_argument(f"--{IGNORED}", default=SUPPRESS, help=SUPPRESS)
        for option in own:
            add_option(parser, option)
        for section in self.sections:
            self._add_section(parser, section)

    def help_or_read(self, words: Sequence[str]) -> dict[str, Any]:
        """``read``, unless ``--help`` or ``--help SECTION`` is among the words: then print that, and leave.

        Raises:
            UserError: as ``read``, or there is no such section.
        """
        if (section := _help_wanted(words)) is not None:
            print(self.help(section))
            raise SystemExit(0)
        return self.read(words)

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """{name of a field or an own option: value} of all that is given; a later word wins over an earlier one, and
        lists add up.

        A value that does not fit its field's type is left as text, so that validation reports it together with what is
        allowed.

        Raises:
            UserError: an unknown option, a word that belongs to no option, or a missing value.
        """
        given = vars(self.parser.parse_args(self.joined(words)))
        given.pop(IGNORED, None)
        return given

    def joined(self, words: Sequence[str]) -> list[str]:
        """Each option and its value as one word, ``--name=value``; names with "_", a switch alone as ``--name=true``.

        Raises:
            UserError: as ``read``.
        """
        result, rest = [], list(words)
        while rest:
            word = rest.pop(0)
            if not word.startswith("--") or word == "--":
                raise UserError(f'{word!r}: unexpected argument; write --section.field value (a list as "a; b")')
            name, separator, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name not in self.switches:
                raise UserError(f"--{name}: unknown option{nearest_option(name, self.fields)}")
            if not separator:
                value = _take_value(name, rest, self.switches[name])
            result.append(f"--{name}={value}")
        return result

    def help(self, section: str = "") -> str:
        """Everything, or one section.

        Raises:
            UserError: there is no such section.
        """
        if not section:
            return self.parser.format_help().rstrip()
        if section not in self.sections:
            known = f"`{self.parser.prog} --help` shows all{nearest(section, self.sections)}"
            raise UserError(f"--help: {section!r} is no section; {known}")
        usage = "%(prog)s [--section.field VALUE ...]"
        parser = ArgumentParser(prog=self.parser.prog, usage=usage, add_help=False, formatter_class=Formatter)
        self._add_section(parser, section)
        return parser.format_help().rstrip()

    def _add_section(self, parser: ArgumentParser, section: str) -> None:
        names, text = self.sections[section]
        group = parser.add_argument_group(section, text)
        for name in names:
            add_field(group.add_argument, name, self.fields[name])


class AddUp(Action):
    """A list that is given more than once has all entries of all of them."""

    def __call__(self, parser: object, namespace: Namespace, values: Any, option: str | None = None) -> None:
        """After what was given before, if both are lists; text that is none is left for the validation."""
        before = getattr(namespace, self.dest, None)
        both = isinstance(before, list) and isinstance(values, list)
        setattr(namespace, self.dest, [*before, *values] if both else values)  # type: ignore[misc]


def add_option(parser: ArgumentParser, option: Option) -> None:
    """A command's own option."""
    how: dict[str, Any] = {"metavar": option.metavar}
    if option.switch:
        how = {"metavar": option_type(bool), "type": partial(_truth, option.name), "nargs": "?"}
    parser.add_argument(f"--{option.name}", default=SUPPRESS, help=option.help, **how)


def add_field(add_argument: Callable[..., object], name: str, info: FieldInfo) -> None:
    """A field under its dotted name and, not listed again, under its aliases."""
    aliases = [alias for alias, field in ALIASES.items() if field == name]
    meanings = [f"--{alias} for {SWITCHES[alias][True]}" if alias in SWITCHES else f"--{alias}" for alias in aliases]
    reader = partial(convert, annotation=info.annotation)
    how: dict[str, Any] = {"dest": name, "default": SUPPRESS}
    if get_origin(plain_type(info.annotation)) is list:
        how["action"] = AddUp
    if info.annotation is bool:
        how["nargs"] = "?"  # for the brackets in the help; ``joined`` has given it its value
    shown = {"metavar": option_type(info.annotation, info.metadata), "help": field_text(info, meanings)}
    add_argument(f"--{name}", type=reader, **shown, **how)
    for alias in aliases:
        add_argument(f"--{alias}", type=partial(_alias_value, alias, reader), help=SUPPRESS, **how)


def fields_of(schema: Schema, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf field with its dotted name, in the order of the schema."""
    for name, info in schema.model_fields.items():
        section = _section(info)
        if section is None:
            yield prefix + name, info
        else:
            yield from fields_of(section, f"{prefix}{name}.")


def sections_of(schema: Schema) -> dict[str, tuple[list[str], str]]:
    """(its fields' dotted names, what it is) of each section; those at the top of the file come first, as ``TOP``."""
    top: list[str] = []
    found = {TOP: (top, "At the top of a TOML file; the others are fields of a [section].")}
    for name, info in schema.model_fields.items():
        section = _section(info)
        if section is None:
            top.append(name)
        else:
            names = [dotted for dotted, _ in fields_of(section, f"{name}.")]
            found[name] = (names, " ".join((section.__doc__ or "").split()))
    return found


def _section(info: FieldInfo) -> Schema | None:
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


@cache
def _plain_options(schema: Schema) -> Options:
    return Options(ArgumentParser(add_help=False), schema)


def parse_overrides(arguments: Sequence[str], schema: Schema) -> dict[str, Any]:
    """``--section.field value``, ``--section.field=value`` and diffusers' names as ``{dotted name: value}``.

    Raises:
        UserError: as ``Options.read``.
    """
    return _plain_options(schema).read(arguments)


def nearest_option(name: str, fields: Mapping[str, FieldInfo]) -> str:
    """The end of a message, as of ``nearest``: the right field of a wrong section before a name that looks similar."""
    by_leaf = {dotted.rpartition(".")[2]: dotted for dotted in fields}
    leaf = name.rpartition(".")[2]
    found = by_leaf.get(leaf) or nearest_name(name, [*fields, *ALIASES]) or by_leaf.get(nearest_name(leaf, by_leaf))
    return f" (nearest: --{found})" if found else ""


def convert(text: str, annotation: Any) -> Any:
    """Read ``text`` as a value of this type; text that does not fit comes back unchanged."""
    annotation = plain_type(annotation)
    options = {plain_type(option) for option in get_args(annotation)}
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    if get_origin(annotation) is list:
        return _convert_list(text, plain_type(get_args(annotation)[0]))
    if get_origin(annotation) is Literal:
        readings = {str(option).lower(): option for option in get_args(annotation)}
        return readings.get(text.lower(), text)
    if annotation is bool:
        return BOOLEANS.get(text.lower(), text)
    if annotation is str or str in options:
        return text
    return _convert_number(text)


def _help_wanted(words: Sequence[str]) -> str | None:
    """The section after ``--help``, "" where none is named; None: no help is asked for."""
    for word, following in pairwise([*words, ""]):
        if word in ("-h", "--help"):
            return "" if following.startswith("-") else following
    return None


def _take_value(name: str, rest: list[str], switch: bool) -> str:
    if switch:
        return rest.pop(0) if rest and rest[0].lower() in BOOLEANS else "true"
    if not rest or rest[0].startswith("--"):
        raise UserError(f"--{name}: a value is missing; write --{name} VALUE")
    return rest.pop(0)


def _alias_value(name: str, reader: partial[Any], text: str) -> Any:
    if name in SWITCHES:
        return SWITCHES[name][_truth(name, text)]
    if name == "validation_prompt":  # one prompt, which may hold a semicolon
        return [text]
    return reader(text)


def _truth(name: str, text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise UserError(f"--{name}: {text!r} is not true or false")
    return BOOLEANS[text.lower()]


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
            return parse_toml(f"value = {text}")["value"]
        except Unreadable:
            return text
    parts = [part.strip() for part in text.split(";")]
    if parts[-1] == "":  # "" is the empty list, and "a;" is one item
        parts.pop()
    is_text = item is str or (isinstance(item, type) and issubclass(item, BaseModel))
    return parts if is_text else [_convert_number(part) for part in parts]
