"""Every op's spec, in one list: what tests, ahead-of-time checks, the report and the benchmarks iterate over."""

from __future__ import annotations

from fastunlearn_kernels.testing.common.spec import OpSpec
from fastunlearn_kernels.testing.specs.adamw8bit_step import SPEC as ADAMW8BIT_STEP
from fastunlearn_kernels.testing.specs.add_noise import SPEC as ADD_NOISE
from fastunlearn_kernels.testing.specs.blockwise_quantize import DEQUANTIZE_SPEC as BLOCKWISE_DEQUANTIZE
from fastunlearn_kernels.testing.specs.blockwise_quantize import QUANTIZE_SPEC as BLOCKWISE_QUANTIZE
from fastunlearn_kernels.testing.specs.guided_noise_loss import SPEC as GUIDED_NOISE_LOSS
from fastunlearn_kernels.testing.specs.guided_step import SPEC as GUIDED_STEP
from fastunlearn_kernels.testing.specs.surgery_apply import SPEC as SURGERY_APPLY
from fastunlearn_kernels.testing.specs.surgery_coefficients import SPEC as SURGERY_COEFFICIENTS
from fastunlearn_kernels.testing.specs.surgery_dots import SPEC as SURGERY_DOTS
from fastunlearn_kernels.testing.specs.weighted_noise_loss import SPEC as WEIGHTED_NOISE_LOSS

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
