"""What a model's output means: epsilon, v or x0, and the factors between them.

With A = alpha-bar: x = sqrt(A) x0 + sqrt(1 - A) e and v = sqrt(A) e - sqrt(1 - A) x0. Not here: schedules.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def prediction_number(prediction_type: str) -> int:
    """Its place in PREDICTION_TYPES, as kernels take it. Raises ValueError for an unknown one."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}; got {prediction_type!r}")
    return PREDICTION_TYPES.index(prediction_type)


def residual_factor(alpha: Tensor, prediction: int) -> Tensor | float:
    """By how much the difference of two predictions at the same latents is to be multiplied to become one of noise, up
    to the sign: 1, sqrt(A), sqrt(A / (1 - A))."""
    if prediction == 0:
        return 1.0
    return alpha.sqrt() if prediction == 1 else (alpha / (1 - alpha)).sqrt()


@triton.jit
def residual_factor_scalar(alpha, PREDICTION: tl.constexpr):
    """The Triton form of `residual_factor`."""
    if PREDICTION == 0:
        factor = alpha * 0 + 1.0
    elif PREDICTION == 1:
        factor = tl.sqrt(alpha)
    else:
        factor = tl.sqrt(alpha / (1 - alpha))
    return factor
