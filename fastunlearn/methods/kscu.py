"""KSCU, Key Step Concept Unlearning (arXiv 2507.06526): fine-tune only the denoising steps that make the concept.

Legend, at one key step with latents x and timestep t; e is the frozen model, s the student, O the unconditional prompt:
    D   = e(x, t, prompt) - e(x, t, anchor)              erased direction; the published anchor is O
    y_c = e(x, t, anchor) - g(t) * D                     conditional target, g = negative_guidance; for styles
                                                         only where the latents are mostly noise
    y_0 = e(x, t, O) - lambda1(t) * D                    unconditional target, lambda1(t) = (1000 - t) * uncond_slope
    L   = mean((s(x, t, prompt~) - y_c)^2) + lambda2 * mean((s(x, t, O) - y_0)^2)
prompt~ is the prompt itself, in the tail of the run an augmented one with a little noise on its embedding.
What remains of a run is an exponential average of the student's weights over about ten updates (``denoisers/ema.py``):
each update is one prompt at one timestep, and the weights swing with it.
The student's predictions also move the trajectory on (``sampling/rollout.py``): unlike in the published code no step is
evaluated twice.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from fastunlearn.errors import UserError
from fastunlearn.methods.base import (
    ByKind,
    KindDefaults,
    Method,
    MethodOutput,
    UNetCalls,
    frozen_predictions,
    guided_prediction,
)
from fastunlearn.sampling.batch import Augmentation, UnlearnBatch
from fastunlearn.sampling.key_steps import KeyStep, key_step_table, scale_start
from fastunlearn.schema.fields import Beta, ConfigModel, Fraction, NonNegativeFloat, PositiveInt

if TYPE_CHECKING:
    from fastunlearn.config import Config
    from fastunlearn.denoisers.predictors import Predictors

# With the published weight of 1e-4 the unconditional term has about a millionth of the conditional gradient at the
# start, and its backward costs as much as the conditional one. "auto" evaluates it from this weight on.
UNCOND_WEIGHT_THAT_MATTERS = 1e-2
# The released trainer for SD 1.4: objects and nudity live in the layout, styles in the detail.
KINDS = {
    "style": KindDefaults(start=24, steps=500, steps_for_several=500, scope="attn2"),
    "object": KindDefaults(start=14, steps=750, steps_for_several=750, scope="attn2"),
    "nudity": KindDefaults(start=14, steps=750, steps_for_several=750, scope="noxattn"),
    "instance": KindDefaults(start=40, steps=200, steps_for_several=750, scope="attn2"),
}


EMA_DECAY = 0.9


class Beyond(NamedTuple):
    """How far beyond the anchor, and from which share of the noise schedule on."""

    guidance: float
    begins: float


AS_PUBLISHED = Beyond(1.0, 0.0)
BEYOND = {"style": Beyond(1.5, 0.8), "object": Beyond(2.0, 0.0), "nudity": AS_PUBLISHED, "instance": AS_PUBLISHED}


class KscuConfig(ConfigModel):
    """Key Step Concept Unlearning (arXiv 2507.06526)."""

    start: Annotated[int, Field(ge=0, lt=45)] | Literal["published"] = 0
    """First trained step on a 50-step scale. published: nudity and object 14, style 24, instance 40, which suit Stable
    Diffusion 1.4; where a model settles the concept earlier, as small ones do, a late start leaves it in pictures."""
    loop: PositiveInt = 8
    """Traversals of the slice before its start advances by one step."""
    negative_guidance: NonNegativeFloat | None = None
    """How far beyond the anchor the conditional target lies. None given: 2 for objects, 1.5 for styles, else or where
    kinds are mixed 1, as published. From some noise the anchor's picture shows the concept by chance, and only going
    beyond it helps there."""
    negative_guidance_from: Fraction | None = None
    """Where in the noise schedule (0 to 1, pure noise) it begins; below, the target is the anchor itself. None given:
    0.8 for styles, else 0, as published: beyond the anchor in the last steps, a style takes away what the picture is
    of, while an object would come back."""
    ema_decay: Beta | None = None
    """Decay of the running mean of the weights that walks the trajectories and is what remains; 0: none, as published.
    None given: 0.9, but none with zero.stage 3, cuda_graphs or a meta term."""
    uncond_slope: NonNegativeFloat = 2e-5
    """Slope of the unconditional guidance lambda1 = (1000 - t) * slope."""
    uncond_weight: NonNegativeFloat = 1e-4
    """Weight lambda2 of the unconditional term in the loss."""
    uncond_gradient: Literal["auto", True, False] = "auto"
    """Whether the unconditional term carries a gradient; auto: only where its weight makes it matter."""


class KscuSpec(ByKind):
    """The facts of the method."""

    title = "KSCU, Key Step Concept Unlearning"
    paper = "2507.06526"
    Settings = KscuConfig
    kinds = KINDS

    def average(self, cfg: Config) -> tuple[float, bool] | None:
        """Where it is left open, wherever it can be."""
        decay = cfg.kscu.ema_decay
        if decay is None:
            apart = cfg.zero_stage == 3 or cfg.model.cuda_graphs or cfg.has_meta
            decay = 0.0 if apart else EMA_DECAY
        return (decay, False) if decay else None

    def refuse(self, cfg: Config) -> None:
        """What an average of whole weights leaves no room for."""
        if cfg.zero_stage == 3 and cfg.kscu.ema_decay:
            raise UserError(
                "kscu.ema_decay: not with zero.stage 3, as the running mean of the weights is a whole copy on every "
                "rank; use 0, or zero.stage 2"
            )

    def calls(self, cfg: Config) -> UNetCalls:
        """Prompt, anchor and, where it is trained, the unconditional prompt."""
        conditions = 2 if trains_uncond(cfg) else 1
        return UNetCalls(teacher=1 + conditions, trained=conditions, beside=3 - conditions)


class KSCU(Method):
    """Key steps, dual target, augmented tail."""

    spec = KscuSpec()

    def table(self) -> list[KeyStep]:
        """The key-step table, with each concept's own start."""
        cfg = self.cfg
        return key_step_table(first_key_steps(cfg), cfg.sampler.num_inference_steps, cfg.max_train_steps, cfg.kscu.loop)

    def augmentation(self, step: KeyStep) -> Augmentation | None:
        """The last ``augment_fraction`` of the updates train on augmented prompts."""
        prompts = self.cfg.prompts
        if prompts.augment_pool == 0 or step.update < (1.0 - prompts.augment_fraction) * self.cfg.max_train_steps:
            return None
        return Augmentation(prompts.augment_embedding_noise)

    def loss(self, models: Predictors, batch: UnlearnBatch) -> MethodOutput:
        """Evaluate teacher and student at a key step; the student's predictions are kept for the sampler."""
        from fastunlearn_kernels import guided_noise_loss

        x, t, settings = batch.latents, batch.timesteps, self.cfg.kscu
        teacher_uncond = student_uncond = None
        if trains_uncond(self.cfg):
            teacher_cond, teacher_anchor, teacher_uncond = frozen_predictions(models, batch, "cond", "anchor", "uncond")
            student_cond, student_uncond = models.train(x, t, batch.trained, batch.uncond)
        else:
            teacher_cond, teacher_anchor = frozen_predictions(models, batch, "cond", "anchor")
            (student_cond,) = models.train(x, t, batch.trained)
        guided = guided_prediction(models, batch, None if batch.augmented else student_cond, student_uncond)
        loss, *_ = guided_noise_loss(
            student_cond,
            student_uncond,
            teacher_cond,
            teacher_anchor,
            teacher_uncond,
            guidance=beyond_anchor(self.cfg, batch.noise),
            lambda1_B=(1000 - t.double()) * settings.uncond_slope,
            uncond_weight=settings.uncond_weight,
            **models.noise.loss_arguments(t, self.cfg.train.loss_weighting),
        )
        return MethodOutput(loss, guided)


def beyond_anchor(cfg: Config, noise: float) -> float:
    """g where the latents are so noisy (1: pure noise): ``negative_guidance`` and where it begins, with their defaults
    filled in."""
    kinds = {cfg.kind_of(concept) for concept in cfg.concepts}
    default = BEYOND[kinds.pop()] if len(kinds) == 1 else AS_PUBLISHED
    given, begins = cfg.kscu.negative_guidance, cfg.kscu.negative_guidance_from
    guidance = default.guidance if given is None else given
    return guidance if noise >= (default.begins if begins is None else begins) else 0.0


def trains_uncond(cfg: Config) -> bool:
    """Whether the unconditional branch takes part in the loss."""
    choice = cfg.kscu.uncond_gradient
    return cfg.kscu.uncond_weight >= UNCOND_WEIGHT_THAT_MATTERS if choice == "auto" else bool(choice)


def first_key_step(cfg: Config, kind: str) -> int:
    """First trained sampler index of a concept of this kind, on the scale of ``cfg.sampler.num_inference_steps``."""
    steps = cfg.sampler.num_inference_steps
    start = KINDS[kind].start if cfg.kscu.start == "published" else cfg.kscu.start
    return min(scale_start(start, steps), math.ceil(0.9 * steps) - 1)


def first_key_steps(cfg: Config) -> list[int]:
    """That of each concept of the run."""
    return [first_key_step(cfg, cfg.kind_of(concept)) for concept in cfg.concepts]
