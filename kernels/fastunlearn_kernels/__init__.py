"""The arithmetic of concept unlearning as small tensor functions, usable without the trainer.

One module per op. Today each holds the plain PyTorch reference, readable beside its formula; it runs on every device.
Not here: models, schedulers, optimizers, anything that knows about prompts. Imports torch only.

Usage: `from fastunlearn_kernels import guided_noise_loss`
"""

from fastunlearn_kernels.add_noise import add_noise
from fastunlearn_kernels.guided_noise_loss import guided_noise_loss
from fastunlearn_kernels.guided_step import PREDICTION_TYPES, apply_guidance, ddim_step, guided_step, to_epsilon

__all__ = [
    "PREDICTION_TYPES",
    "add_noise",
    "apply_guidance",
    "ddim_step",
    "guided_noise_loss",
    "guided_step",
    "to_epsilon",
]
