"""MiniCanvas: the embedded default model, a small SDXL that draws ten objects in eight styles, and its judge.

The names below are what the rest of the package uses. The words cost nothing to import; torch is loaded when
`load_judge` is called. How model and judge were made: `README.md` in this folder, `fastunlearn minicanvas rebuild`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastunlearn.minicanvas.vocabulary import (
    EVALUATION_TEMPLATE,
    OBJECTS,
    PARAPHRASES,
    STYLES,
    SYNONYMS,
    TEMPLATES,
    concept_kind,
    normalise_concept,
)

if TYPE_CHECKING:
    from fastunlearn.minicanvas.judge import Judge

__all__ = [
    "EVALUATION_TEMPLATE",
    "OBJECTS",
    "PARAPHRASES",
    "STYLES",
    "SYNONYMS",
    "TEMPLATES",
    "concept_kind",
    "load_judge",
    "normalise_concept",
    "pipeline_path",
]


def pipeline_path() -> Path:
    """The folder of the shipped diffusers SDXL pipeline."""
    return Path(__file__).parent / "model"


def load_judge(device: str = "cpu") -> Judge:
    """The shipped classifier of objects and styles, in float32 on `device`."""
    from fastunlearn.minicanvas.judge import load_judge as load

    return load(device)
