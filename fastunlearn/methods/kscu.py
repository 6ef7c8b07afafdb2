"""KSCU, Key Step Concept Unlearning (arXiv 2507.06526): fine-tune only the denoising steps that make the concept.

What this is: the key-step table, the conditional and unconditional targets, and the augmented tail.
What this is not: the trajectory (``rollout.py``), or the published code's waste: no step is evaluated twice.

Legend, at one key step with latents x and timestep t; e is the frozen model, s the student, O the unconditional prompt:
    D   = e(x, t, prompt) - e(x, t, anchor)              erased direction; the published anchor is O
    y_c = e(x, t, anchor) - g * D                        conditional target, g = negative_guidance
    y_0 = e(x, t, O) - lambda1(t) * D                    unconditional target, lambda1(t) = (1000 - t) * uncond_slope
    L   = mean((s(x, t, prompt~) - y_c)^2) + lambda2 * mean((s(x, t, O) - y_0)^2)
prompt~ is the prompt itself, in the tail of the run an augmented one with a little noise on its embedding.
"""

from __future__ import annotations

from fastunlearn.config import resolved_start, resolved_steps
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.methods.base import Method, MethodOutput, frozen_predictions, sampler_pair
from fastunlearn.sampling.key_steps import KeyStep, key_step_table
from fastunlearn.sampling.rollout import Augmentation, UnlearnBatch
from fastunlearn_kernels import guided_noise_loss

# With the published weight of 1e-4 the unconditional term has about a millionth of the conditional gradient at the
# start, and its backward costs as much as the conditional one. "auto" evaluates it from this weight on.
UNCOND_WEIGHT_THAT_MATTERS = 1e-2


class KSCU(Method):
    """Key steps, dual target, augmented tail."""

    def table(self) -> list[KeyStep]:
        """The key-step table, with each concept's own start."""
        cfg = self.cfg
        steps = cfg.sampler.num_inference_steps
        starts = [resolved_start(cfg, cfg.kind_of(concept)) for concept in cfg.concepts]
        return key_step_table(starts, steps, resolved_steps(cfg), cfg.kscu.loop)

    def augmentation(self, step: KeyStep) -> Augmentation | None:
        """The last ``augment_fraction`` of the updates train on augmented prompts."""
        prompts, updates = self.cfg.prompts, resolved_steps(self.cfg)
        if prompts.augment_pool == 0 or step.update < (1.0 - prompts.augment_fraction) * updates:
            return None
        return Augmentation(prompts.augment_embedding_noise)

    @property
    def trains_uncond(self) -> bool:
        """Whether the unconditional branch takes part in the loss."""
        choice = self.cfg.kscu.uncond_gradient
        return self.cfg.kscu.uncond_weight >= UNCOND_WEIGHT_THAT_MATTERS if choice == "auto" else bool(choice)

    def loss(self, models: Predictors, window: UnlearnBatch) -> MethodOutput:
        """Evaluate teacher and student at a key step; the student's predictions are kept for the sampler."""
        x, t = window.latents, window.timestep
        teacher_uncond = student_uncond = None
        if self.trains_uncond:
            teacher_cond, teacher_anchor, teacher_uncond = frozen_predictions(
                models, window, "cond", "anchor", "uncond"
            )
            student_cond, student_uncond = models.train(x, t, window.trained, window.uncond)
        else:
            teacher_cond, teacher_anchor = frozen_predictions(models, window, "cond", "anchor")
            (student_cond,) = models.train(x, t, window.trained)
        pair = sampler_pair(models, window, None if window.augmented else student_cond, student_uncond)

        loss, *_ = guided_noise_loss(
            student_cond,
            student_uncond,
            teacher_cond,
            teacher_anchor,
            teacher_uncond,
            guidance=self.cfg.kscu.negative_guidance,
            lambda1_B=(1000 - t) * self.cfg.kscu.uncond_slope,
            uncond_weight=self.cfg.kscu.uncond_weight,
            alpha_t=models.backbone.scheduler.alphas_cumprod[t],
            prediction_type=models.backbone.prediction_type,
        )
        return MethodOutput(loss, pair)
