"""ESD, Erased Stable Diffusion (arXiv 2303.07345): the baseline that KSCU refines.

A uniformly drawn denoising step, on a fresh trajectory of the model being edited, with negative guidance as target of
the conditional prediction: y = e(x, t, anchor) - g * (e(x, t, prompt) - e(x, t, anchor)), e being the frozen model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fastunlearn.errors import UserError
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
    """How far beyond the anchor the target lies, as ``guidance_convention`` counts it. The published code walks the
    trajectory with the frozen U-Net at guidance 2 or 3; here the model that is edited walks it."""
    guidance_convention: Literal["anchor", "published"] = "anchor"
    """From where it is counted. anchor: 0 is the anchor itself; published: from the prompt, as in ESD's code for SDXL,
    so that 1 is the anchor, and what is given is one more than here."""


class EsdSpec(MethodSpec):
    """The facts of the method."""

    title = "ESD, Erased Stable Diffusion"
    paper = "2303.07345"
    Settings = EsdConfig
    steps = 1000

    def refuse(self, cfg: Config) -> None:
        """A published guidance that would not reach the anchor."""
        if beyond_anchor(cfg.esd) < 0:
            raise UserError(
                f"esd.negative_guidance: {cfg.esd.negative_guidance:g} in the published convention does not reach the "
                "anchor; give 1 or more, or use esd.guidance_convention 'anchor'"
            )

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
            guidance=beyond_anchor(self.cfg.esd),
            **models.noise.loss_arguments(t, self.cfg.train.loss_weighting),
        )
        return MethodOutput(loss, guided)


def beyond_anchor(esd: EsdConfig) -> float:
    """g of the formula above: the published one less 1."""
    return esd.negative_guidance - (1.0 if esd.guidance_convention == "published" else 0.0)
