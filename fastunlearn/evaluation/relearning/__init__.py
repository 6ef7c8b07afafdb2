"""The relearning test: how quickly an attacker brings an erased concept back by fine-tuning.
Not here: the attacks themselves (`evaluation/attacks/`), or a defence (`meta/`). The names are loaded on first use.

    from fastunlearn.evaluation.relearning import Settings, relearn
    result = relearn("output/neon", Settings(attack="lora", seeds=(0, 1)))
    result["summary"]["steps_to_half"], result["runs"][0]["recognised"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastunlearn.evaluation.attacks.settings import Settings

if TYPE_CHECKING:
    from fastunlearn.evaluation.attacks.fine_tuning import attack_steps, denoising_error
    from fastunlearn.evaluation.relearning.experiment import relearn

__all__ = ["Settings", "attack_steps", "denoising_error", "relearn"]


def __getattr__(name: str) -> Any:
    if name == "relearn":
        from fastunlearn.evaluation.relearning import experiment

        return experiment.relearn
    if name in __all__:
        from fastunlearn.evaluation.attacks import fine_tuning

        return getattr(fine_tuning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
