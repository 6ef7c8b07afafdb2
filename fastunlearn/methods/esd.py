"""ESD, Erased Stable Diffusion (arXiv 2303.07345): the baseline that KSCU refines.

A uniformly drawn denoising step, on a fresh trajectory of the model being edited, with negative guidance as target of
the conditional prediction: y = e(x, t, anchor) - g * (e(x, t, prompt) - e(x, t, anchor)), e being the frozen model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fastunlearn.methods.base import Method, MethodOutput, MethodSpec, frozen_predictions, guided_prediction
from fastunlearn.sampling.batch import UnlearnBatch
from fastunlearn.schema.fields import ConfigModel, NonNegativeFloat, Scope

if TYPE_CHECKING:
    from fastunlearn.config import Config
    from fastunlearn.denoisers.predictors import Predictors

SCOPES: dict[str, Scope] = {"x": "attn2", "x-strict": "attn2_kv", "u": "noxattn", "full": "full"}


class EsdConfig(ConfigModel):
    """Erased Stable Diffusion (arXiv 2303.07345), the baseline."""

    variant: Literal["x", "x-strict", "u", "full"] = "x"
    """What is trained, as a ``train.scope``: x is attn2, x-strict attn2_kv, u noxattn, full everything."""
    negative_guidance: NonNegativeFloat = 1.0
    """How far beyond the anchor the target lies."""


class EsdSpec(MethodSpec):
    """The facts of the method."""

    title = "ESD, Erased Stable Diffusion"
    paper = "2303.07345"
    Settings = EsdConfig
    steps = 1000

    def default_scope(self, cfg: Config) -> str:
        """That of the variant."""
        return SCOPES[cfg.esd.variant]


class ESD(Method):
    """Uniform steps, conditional target only."""

    spec = EsdSpec()

    def loss(self, models: Predictors, batch: UnlearnBatch) -> MethodOutput:
        """Evaluate teacher and student at the drawn step."""
        from fastunlearn_kernels import guided_noise_loss

        x, t = batch.latents, batch.timesteps
        teacher_cond, teacher_anchor = frozen_predictions(models, batch, "cond", "anchor")
        (student_cond,) = models.train(x, t, batch.trained)
        guided = guided_prediction(models, batch, student_cond, None)
        loss, *_ = guided_noise_loss(
            student_cond,
            None,
            teacher_cond,
            teacher_anchor,
            None,
            guidance=self.cfg.esd.negative_guidance,
            **models.noise.loss_arguments(t),
        )
        return MethodOutput(loss, guided)
