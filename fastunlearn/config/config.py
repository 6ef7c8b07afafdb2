"""The configuration of a run, read from TOML and overridden from the command line.

    cfg = load_config("configs/minicanvas_style.toml", ["--train.max_train_steps", "100"])

The fields are in ``schema/`` and in the files of methods and engines, what follows from them in ``base.py``, refusals
in the files that end in ``_rules``; TOML is read in ``loader.py``, the command line in ``options.py``. Nothing here
imports torch.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError, model_validator

from fastunlearn.config.base import RunConfig, resolved_keep, resolved_scope, resolved_steps
from fastunlearn.config.concept_rules import check_config, check_runtime
from fastunlearn.config.loader import emit_toml, merge, one_line, read_toml
from fastunlearn.config.options import Option, Options, parse_overrides
from fastunlearn.config.presets import preset_file
from fastunlearn.errors import UserError
from fastunlearn.schema.fields import quoted

OF_ONE_MODEL = ("revision", "variant")
LAUNCHED = """\
Erase concepts from a Stable Diffusion or SDXL model. The launcher's own options come first:

  deepspeed --num_gpus 2 fastunlearn/train.py --preset sdxl-2x24gb-style --output_dir output/style"""
SOURCES = (
    Option("preset", "a bundled configuration; `fastunlearn presets` lists them", "NAME"),
    Option("config", "a TOML file: one of your own, or the config.toml that a run has left", "FILE"),
)


class Config(RunConfig):
    """A whole run. An instance that exists has passed every check that needs neither the disk nor the machine."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        check_config(self)
        return self

    def to_toml(self) -> str:
        """This configuration as TOML; ``load_config`` reads the same one back. None is left out, being the default."""
        data = self.model_dump()
        return emit_toml(data | {"keep": [quoted(name) for name in data["keep"]]})

    def resolved(self) -> Config:
        """The same run with the defaults that depend on method and concepts filled in."""
        data = self.model_dump()
        for concept, entry in zip(self.concepts, data["concepts"], strict=True):
            entry["kind"] = self.kind_of(concept)
        if not self.closed_form:  # what "auto" stands for follows from keep, which is filled in here
            data["surgery"] |= {"enabled": self.asks_surgery, "rho": self.rho}
            if self.protects_unasked:
                data["retain"] |= {"source": self.retain_source, "batch_size": self.retain_batch_size}
        data["keep"] = resolved_keep(self)
        data["train"]["max_train_steps"] = resolved_steps(self) or None
        data["train"]["scope"] = resolved_scope(self)
        return Config.model_validate(data)

    def validate_runtime(self, world_size: int, cpu_count: int | None = None, has_gpu: bool = False) -> None:
        """Refuse what this machine cannot do with this many ranks; ``cpu_count`` None: the cores this process may use.

        Raises:
            UserError: too many ranks, or xformers without a GPU.
        """
        check_runtime(self, world_size, cpu_count, has_gpu)


def load_config(path: str | None, overrides: list[str]) -> Config:
    """Read a TOML file (None: defaults only) and apply command-line overrides on top.

    Where they name another model than the file does, the file's ``revision`` and ``variant`` are dropped with it.

    Args:
        path: the file, or None.
        overrides: arguments such as ``["--train.learning_rate", "1e-4", "--concepts=cat; dog"]``.

    Raises:
        UserError: the file cannot be read, or a field is unknown, of the wrong type or out of range.
    """
    return _read(path, parse_overrides(overrides, Config))


def run_options(parser: ArgumentParser, *own: Option) -> Options:
    """The options of a command that reads a whole run, for ``config_of``, and what else the command takes."""
    return Options(parser, Config, (*SOURCES, *own))


def config_of(given: dict[str, Any]) -> Config:
    """The configuration that ``run_options(...).help_or_read(...)`` found, without the command's own options.

    Raises:
        UserError: as ``load_config``, or the preset is unknown.
    """
    path, preset = given.pop("config", None), given.pop("preset", None)
    if preset is not None:
        if path is not None:
            raise UserError(f"--preset: {preset!r} and --config {path!r} were given; allowed is one of the two")
        path = str(preset_file(preset))
    return _read(path, given)


def config_from_arguments(arguments: Sequence[str]) -> Config:
    """The configuration of ``train.py [--preset NAME | --config FILE] [overrides]``; ``--help`` prints and leaves.

    Raises:
        UserError: as ``config_of``.
    """
    parser = ArgumentParser(prog="deepspeed fastunlearn/train.py", description=LAUNCHED)
    return config_of(run_options(parser).help_or_read(arguments))


def _read(path: str | None, given: dict[str, Any]) -> Config:
    data = read_toml(path) if path is not None else {}
    _forget_the_files_model(data, given)
    merge(data, given)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise one_line(error, Config) from None


def _forget_the_files_model(data: dict[str, Any], given: dict[str, Any]) -> None:
    """Drop, in place, what a file says of its own model where the command line names another one."""
    model, named = data.get("model"), "pretrained_model_name_or_path"
    if isinstance(model, dict) and f"model.{named}" in given and given[f"model.{named}"] != model.get(named):
        for field in OF_ONE_MODEL:
            model.pop(field, None)
