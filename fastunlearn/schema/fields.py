"""The types that fields share, and every vocabulary as one ``Literal``: whoever lists one reads it from here."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
)
from pydantic_core import PydanticCustomError

from fastunlearn.errors import UserError
from fastunlearn.registry import Registry

__all__ = [
    "AttentionBackend",
    "Beta",
    "ConceptKind",
    "ConfigModel",
    "Fraction",
    "GradientDtype",
    "KernelBackend",
    "KnownIn",
    "LossWeighting",
    "MixedPrecision",
    "NonNegativeFloat",
    "NonNegativeInt",
    "Offload",
    "PathStr",
    "PositiveFloat",
    "PositiveInt",
    "PredictionType",
    "SamplerSteps",
    "Scope",
    "StrippedStr",
    "WeightDtype",
    "one_name",
    "quoted",
]

PathStr = Annotated[str, AfterValidator(os.path.expanduser)]
StrippedStr = Annotated[str, StringConstraints(strip_whitespace=True)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
SamplerSteps = Annotated[int, Field(ge=2, le=1000)]

ConceptKind: TypeAlias = Literal["style", "object", "nudity", "instance"]
Scope: TypeAlias = Literal["attn2", "attn2_kv", "attn", "selfattn", "noxattn", "noxattn_all", "full"]
LossWeighting: TypeAlias = Literal["epsilon", "prediction"]
PredictionType: TypeAlias = Literal["epsilon", "v_prediction"]
MixedPrecision: TypeAlias = Literal["no", "bf16"]
WeightDtype: TypeAlias = Literal["fp16", "bf16", "fp32"]
GradientDtype: TypeAlias = Literal["fp32", "bf16", "int8"]
Offload: TypeAlias = Literal["none", "cpu"]
KernelBackend: TypeAlias = Literal["auto", "reference", "triton"]
AttentionBackend: TypeAlias = Literal[
    "auto", "eager", "sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math", "xformers", "flash3"
]


class ConfigModel(BaseModel):
    """Base of every section: unknown fields, wrong types, NaN and later assignment are all refused."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def changed_fields(self) -> dict[str, Any]:
        """Those whose values are not the defaults, whoever set them."""
        defaults = {
            name: field.get_default(call_default_factory=True) for name, field in type(self).model_fields.items()
        }
        return {name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]}


SEPARATORS = "[,;\n，、；]"


def one_name(field: str, text: str) -> str:
    """The name of one concept. A list in one text is refused; in quotes, '"a, b"', it is a name after all.

    Raises:
        UserError: with the list as it is written.
    """
    text = text.strip()
    if len(text) > 2 and text[0] == text[-1] == '"':
        return text[1:-1]
    parts = [part.strip() for part in re.split(SEPARATORS, text) if part.strip()]
    if len(parts) > 1:
        raise UserError(
            f'{field}: {text!r} is one name; for {len(parts)} write "{"; ".join(parts)}" on the command line or '
            f"{parts} in a file, and for one with such a sign in it '\"{text}\"'"
        )
    return text


def quoted(name: str) -> str:
    """As ``one_name`` reads it back."""
    return f'"{name}"' if re.search(SEPARATORS, name) else name


class KnownIn:
    """A validator that refuses what is neither in the registry nor one of ``others``, as pydantic refuses a literal."""

    def __init__(self, registry: Registry, *others: str) -> None:
        self.registry, self.others = registry, others

    @property
    def names(self) -> tuple[str, ...]:
        """What is allowed."""
        return (*self.others, *self.registry.entries)

    def __call__(self, name: str) -> str:
        if name not in self.names:
            *first, last = [repr(known) for known in self.names]
            expected = f"{', '.join(first)} or {last}" if first else last
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return name
