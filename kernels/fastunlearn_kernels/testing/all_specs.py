"""Every op's declaration, in one list: what tests, ahead-of-time checks, the report and the benchmarks iterate over.

Apart from spec.py, which the ops import, and from the front of the package, which needs none of it.
"""

from __future__ import annotations

from fastunlearn_kernels.adamw8bit.step import SPEC as ADAMW8BIT_STEP
from fastunlearn_kernels.gradients.surgery_apply import SPEC as SURGERY_APPLY
from fastunlearn_kernels.gradients.surgery_coefficients import SPEC as SURGERY_COEFFICIENTS
from fastunlearn_kernels.gradients.surgery_dots import SPEC as SURGERY_DOTS
from fastunlearn_kernels.latent.add_noise import SPEC as ADD_NOISE
from fastunlearn_kernels.latent.guided_noise_loss import SPEC as GUIDED_NOISE_LOSS
from fastunlearn_kernels.latent.guided_step import SPEC as GUIDED_STEP
from fastunlearn_kernels.latent.weighted_noise_loss import SPEC as WEIGHTED_NOISE_LOSS
from fastunlearn_kernels.quantize.blockwise_quantize import DEQUANTIZE_SPEC as BLOCKWISE_DEQUANTIZE
from fastunlearn_kernels.quantize.blockwise_quantize import QUANTIZE_SPEC as BLOCKWISE_QUANTIZE
from fastunlearn_kernels.testing.spec import OpSpec

ALL_SPECS: tuple[OpSpec, ...] = (
    ADD_NOISE,
    GUIDED_NOISE_LOSS,
    WEIGHTED_NOISE_LOSS,
    GUIDED_STEP,
    SURGERY_DOTS,
    SURGERY_COEFFICIENTS,
    SURGERY_APPLY,
    BLOCKWISE_QUANTIZE,
    BLOCKWISE_DEQUANTIZE,
    ADAMW8BIT_STEP,
)
