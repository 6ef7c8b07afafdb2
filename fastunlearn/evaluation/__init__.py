"""Scoring: what was erased, what else changed, and how sure that is. The names are loaded on first use.
Not here: training, which imports nothing of this, or the files of a run (`export/`).

    from fastunlearn.evaluation import evaluate_model
    config, result = evaluate_model("output/neon")
    result["after"]["UA"], result["after"]["intervals"]["UA"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastunlearn.evaluation.evaluate import NotRecognised, evaluate_model, evaluate_pair, why_not_evaluated

__all__ = ["NotRecognised", "evaluate_model", "evaluate_pair", "why_not_evaluated"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from fastunlearn.evaluation import evaluate as evaluation

        return getattr(evaluation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
