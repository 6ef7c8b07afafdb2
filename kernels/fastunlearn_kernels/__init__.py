"""The arithmetic of concept unlearning as fused Triton kernels and plain PyTorch, usable without the trainer.

One module per op, always in this order: public function, reference, kernels, launcher, registered op. On CUDA and ROCm
tensors the kernels run, elsewhere the reference; `common.backend` says how to choose. Models, schedulers and prompts
are the trainer's; cases and checks are in `testing`, which is not imported from here. Imports torch and triton.

Usage: `from fastunlearn_kernels import guided_noise_loss`
"""

from fastunlearn_kernels.adamw8bit.optimizer import AdamW8bit
from fastunlearn_kernels.adamw8bit.step import adamw8bit_step
from fastunlearn_kernels.common.tiles import QUANT_BLOCK
from fastunlearn_kernels.gradients.segments import Segments
from fastunlearn_kernels.gradients.surgery_apply import surgery_apply
from fastunlearn_kernels.gradients.surgery_coefficients import SurgeryPlan, surgery_coefficients
from fastunlearn_kernels.gradients.surgery_dots import surgery_dots
from fastunlearn_kernels.latent.add_noise import add_noise
from fastunlearn_kernels.latent.guided_noise_loss import NoiseLoss, guided_noise_loss
from fastunlearn_kernels.latent.guided_step import apply_guidance, ddim_step, guided_euler_step, guided_step, to_epsilon
from fastunlearn_kernels.latent.prediction import PREDICTION_TYPES
from fastunlearn_kernels.latent.weighted_noise_loss import WeightedLoss, weighted_noise_loss
from fastunlearn_kernels.quantize.blockwise_quantize import Quantized, blockwise_dequantize, blockwise_quantize

Plan = SurgeryPlan  # its name before there were other plans

__all__ = [
    "PREDICTION_TYPES",
    "QUANT_BLOCK",
    "AdamW8bit",
    "NoiseLoss",
    "Plan",
    "Quantized",
    "Segments",
    "SurgeryPlan",
    "WeightedLoss",
    "adamw8bit_step",
    "add_noise",
    "apply_guidance",
    "blockwise_dequantize",
    "blockwise_quantize",
    "ddim_step",
    "guided_euler_step",
    "guided_noise_loss",
    "guided_step",
    "surgery_apply",
    "surgery_coefficients",
    "surgery_dots",
    "to_epsilon",
    "weighted_noise_loss",
]
