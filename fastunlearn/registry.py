"""What can be added to this package, and where: one line for each method, engine, optimizer, format, metric and so on.

An entry is text, "module:attribute", and is imported when somebody asks for it. So a lower package can read what an
upper one declares (the configuration reads a method's defaults), and nothing heavy is loaded before it is needed: a
module that is named here must be importable without torch.

To add one, write its file and enter it here; `docs/developing.md` has an example of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from inspect import get_annotations
from types import ModuleType
from typing import Any

from fastunlearn.errors import UserError, nearest


class Registry(Mapping[str, Any]):
    """Names and what they stand for, imported on first use. ``field``: where a user writes the name."""

    def __init__(self, field: str, entries: Mapping[str, str]) -> None:
        self.field = field
        self.entries = dict(entries)
        self._complete: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """What ``name`` stands for, complete.

        Raises:
            KeyError: the name is unknown.
            UserError: its line here, or the file that it names, lacks something.
        """
        module, _, attribute = self.entries[name].partition(":")
        imported = self._imported(name, module)
        if not hasattr(imported, attribute):
            raise self.mistake(name, f"{module} has no {attribute!r}{nearest(attribute, vars(imported))}")
        entry = getattr(imported, attribute)
        if self.entries[name] not in self._complete:
            lacking = what_is_missing(entry)
            if lacking:
                raise self.mistake(name, f"it lacks {', '.join(lacking)}; see its base class")
            self._complete.add(self.entries[name])
        return entry

    def mistake(self, name: str, what: str) -> UserError:
        """One line on an entry that is not as it should be: where a user writes its name, and which file it is in."""
        return UserError(f"{self.field}: {name!r} ({self.entries[name]}) cannot be used: {what}")

    def _imported(self, name: str, module: str) -> ModuleType:
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise  # a library of its own
            raise self.mistake(name, f"there is no module {error.name}") from None
        except TypeError as error:
            if "abstract" not in str(error):
                raise
            raise self.mistake(name, str(error)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def get_known(self, name: str) -> Any:
        """What ``name`` stands for.

        Raises:
            UserError: the name is unknown; with the known ones, and the nearest.
        """
        if name not in self.entries:
            known = ", ".join(self.entries)
            raise UserError(f"{self.field}: {name!r} is unknown; allowed are {known}{nearest(name, self.entries)}")
        return self[name]


def what_is_missing(entry: Any) -> list[str]:
    """Facts and functions that an entry's base classes ask for and that it does not have.

    A fact is an attribute that a base class annotates without a value. Of a class its ``spec`` is looked at, too.
    """
    if not isinstance(entry, type):
        annotated = [name for base in type(entry).__mro__ for name in get_annotations(base)]
        return [name for name in dict.fromkeys(annotated) if not hasattr(entry, name)]
    missing = sorted(getattr(entry, "__abstractmethods__", ()))
    if not hasattr(entry, "spec"):
        return [*missing, "spec"]
    return [*missing, *(f"spec.{name}" for name in what_is_missing(entry.spec))]


METHODS = Registry(
    "method",
    {
        "kscu": "fastunlearn.methods.kscu:KSCU",
        "esd": "fastunlearn.methods.esd:ESD",
        "doco": "fastunlearn.methods.doco:DoCo",
        "sdd": "fastunlearn.methods.sdd:SDD",
        "uce": "fastunlearn.methods.uce:UCE",
        "rece": "fastunlearn.methods.rece:RECE",
    },
)
ENGINES = Registry(
    "engine", {"zero": "fastunlearn.engines.zero.spec:SPEC", "fused": "fastunlearn.engines.fused.spec:SPEC"}
)
OPTIMIZERS = Registry(
    "optimizer.name",
    {
        "adamw": "fastunlearn.engines.optimizers.adamw:SPEC",
        "adamw8bit": "fastunlearn.engines.optimizers.adamw8bit:SPEC",
        "paged_adamw8bit": "fastunlearn.engines.optimizers.paged_adamw8bit:SPEC",
    },
)
ARCHITECTURES = Registry(
    "architecture",
    {
        "sdxl": "fastunlearn.models.architectures.sdxl:SDXL",
        "sd1": "fastunlearn.models.architectures.sd1:SD1",
        "sd2": "fastunlearn.models.architectures.sd2:SD2",
    },
)
FORMATS = Registry(
    "export.formats",
    {"unet": "fastunlearn.export.formats.unet:FORMAT", "delta": "fastunlearn.export.formats.delta:FORMAT"},
)
CLASSIFIERS = Registry(
    "evaluation.classifier", {"minicanvas": "fastunlearn.evaluation.classifiers.minicanvas:CLASSIFIER"}
)
METRICS = Registry(
    "evaluation.metrics",
    {
        "UA": "fastunlearn.evaluation.metrics.erased:UA",
        "IRA": "fastunlearn.evaluation.metrics.kept:IRA",
        "CRA": "fastunlearn.evaluation.metrics.kept:CRA",
        "CRA_target": "fastunlearn.evaluation.metrics.kept:CRA_TARGET",
        "UA_paraphrase": "fastunlearn.evaluation.metrics.erased:UA_PARAPHRASE",
        "IRA_paraphrase": "fastunlearn.evaluation.metrics.kept:IRA_PARAPHRASE",
        "CRA_paraphrase": "fastunlearn.evaluation.metrics.kept:CRA_PARAPHRASE",
        "UA_synonym": "fastunlearn.evaluation.metrics.erased:UA_SYNONYM",
    },
)
ATTACKS = Registry(
    "--attack",
    {
        "full": "fastunlearn.evaluation.attacks.weights:FULL",
        "attn": "fastunlearn.evaluation.attacks.weights:ATTENTION",
        "lora": "fastunlearn.evaluation.attacks.lora:LORA",
        "textual-inversion": "fastunlearn.evaluation.attacks.textual_inversion:TEXTUAL_INVERSION",
    },
)
