"""ESD, Erased Stable Diffusion (arXiv 2303.07345): the baseline that KSCU refines.

What this is: a uniformly drawn denoising step, on a fresh trajectory of the model being edited, with a target of
negative guidance for the conditional prediction: y = e(x, t, anchor) - g * (e(x, t, prompt) - e(x, t, anchor)).
What this is not: a second trainer. Only the table and the loss differ from KSCU; the variants (x, x-strict, u, full)
are scopes in ``config_rules.py``.
"""

from __future__ import annotations

from fastunlearn.config import resolved_steps
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.methods.base import Method, MethodOutput, frozen_predictions, sampler_pair
from fastunlearn.sampling.key_steps import KeyStep, uniform_table
from fastunlearn.sampling.rollout import UnlearnBatch
from fastunlearn_kernels import guided_noise_loss


class ESD(Method):
    """Uniform steps, conditional target only."""

    def table(self) -> list[KeyStep]:
        """One fresh trajectory per update, stopped at a uniformly drawn step."""
        cfg = self.cfg
        return uniform_table(len(cfg.concepts), cfg.sampler.num_inference_steps, resolved_steps(cfg), cfg.seed)

    def loss(self, models: Predictors, window: UnlearnBatch) -> MethodOutput:
        """Evaluate teacher and student at the drawn step."""
        x, t = window.latents, window.timestep
        teacher_cond, teacher_anchor = frozen_predictions(models, window, "cond", "anchor")
        (student_cond,) = models.train(x, t, window.trained)
        pair = sampler_pair(models, window, student_cond, None)
        loss, *_ = guided_noise_loss(
            student_cond,
            None,
            teacher_cond,
            teacher_anchor,
            None,
            guidance=self.cfg.esd.negative_guidance,
            alpha_t=models.backbone.scheduler.alphas_cumprod[t],
            prediction_type=models.backbone.prediction_type,
        )
        return MethodOutput(loss, pair)
