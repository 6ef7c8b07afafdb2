"""SDD, Safe self-Distillation Diffusion (arXiv 2307.05977): the student learns to ignore the concept, from itself.

What this is: a uniformly drawn denoising step, on a fresh trajectory that the running mean of the weights walks, and a
loss between two predictions of the student.
What this is not: the running mean (``ema.py``), which is also what remains of a run.

Legend, at latents x and timestep t; s the student's noise prediction, O the
prompt without the concept, by default the empty one:
    L = mean((s(x, t, prompt) - stopgrad s(x, t, O))^2)
Nothing is asked of the original model: there is no frozen teacher, unless a retain loss wants one.
"""

from __future__ import annotations

from fastunlearn.config import resolved_steps
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.methods.base import Method, MethodOutput, sampler_pair
from fastunlearn.sampling.key_steps import KeyStep, uniform_table
from fastunlearn.sampling.rollout import UnlearnBatch
from fastunlearn_kernels import to_epsilon


class SDD(Method):
    """Uniform steps, the student's own prediction without the concept as target."""

    uses_ema = True

    def table(self) -> list[KeyStep]:
        """One fresh trajectory per update, stopped at a uniformly drawn step."""
        cfg = self.cfg
        return uniform_table(len(cfg.concepts), cfg.sampler.num_inference_steps, resolved_steps(cfg), cfg.seed)

    def loss(self, models: Predictors, window: UnlearnBatch) -> MethodOutput:
        """Evaluate the student twice at the drawn step; only at the concept with a graph."""
        x, t = window.latents, window.timestep
        (target,) = models.student(x, t, window.anchor)
        (student,) = models.train(x, t, window.trained)
        alpha, kind = models.backbone.scheduler.alphas_cumprod[t], models.backbone.prediction_type
        difference = to_epsilon(student, x, alpha, kind) - to_epsilon(target, x, alpha, kind)
        return MethodOutput(difference.square().mean(), sampler_pair(models, window, None, None))
