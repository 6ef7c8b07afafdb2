"""SDD, Safe self-Distillation Diffusion (arXiv 2307.05977): the student learns to ignore the concept, from itself.

A uniformly drawn denoising step, on a fresh trajectory that an exponential average of the weights walks, and a loss
between two predictions of the student. The average (``denoisers/ema.py``) is also what remains of a run.

Legend, at latents x and timestep t; s the student's noise prediction, O the prompt without the concept, by default the
empty one:
    L = mean((s(x, t, prompt) - stopgrad s(x, t, O))^2)
Nothing is asked of the original model: there is no frozen teacher, unless a retain loss wants one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastunlearn.errors import UserError
from fastunlearn.methods.base import Method, MethodOutput, MethodSpec, UNetCalls, guided_prediction
from fastunlearn.sampling.batch import UnlearnBatch
from fastunlearn.schema.fields import Beta, ConfigModel

if TYPE_CHECKING:
    from fastunlearn.config import Config
    from fastunlearn.denoisers.predictors import Predictors


class SddConfig(ConfigModel):
    """Safe self-Distillation Diffusion (arXiv 2307.05977)."""

    ema_decay: Beta = 0.999
    """Decay of the running mean of the weights that walks the trajectories and is what remains in the end."""
    ema_warmup: bool = False
    """Let the decay rise from nothing as (1 + n) / (10 + n) in update n, for runs much shorter than 1 / (1 - decay)."""


class SddSpec(MethodSpec):
    """The facts of the method."""

    title = "SDD, Safe self-Distillation Diffusion"
    paper = "2307.05977"
    Settings = SddConfig
    steps = 1500
    asks_teacher = False

    def calls(self, cfg: Config) -> UNetCalls:
        """The student with the concept, and without it as the target."""
        return UNetCalls(teacher=0, trained=1, own_target=1)

    def average(self, cfg: Config) -> tuple[float, bool]:
        """It always has one."""
        return cfg.sdd.ema_decay, cfg.sdd.ema_warmup

    def refuse(self, cfg: Config) -> None:
        """What an average of whole weights, or targets of the student's own, leave no room for."""
        if cfg.zero_stage == 3:
            raise UserError(
                "zero.stage: 3 with method 'sdd', whose running mean of the weights is a whole copy on every rank; use "
                "zero.stage 2"
            )
        if cfg.teacher.storage == "cached":
            raise UserError(
                "teacher.storage: 'cached' has no meaning for method 'sdd', whose targets are its student's; use "
                "'exact'"
            )
        if cfg.teacher.storage != "exact" and not cfg.needs_teacher:
            raise UserError(
                f"teacher.storage: {cfg.teacher.storage!r} has no meaning for method 'sdd' without surgery, which "
                "needs no teacher; use 'exact'"
            )


class SDD(Method):
    """Uniform steps, the student's own prediction without the concept as target."""

    spec = SddSpec()

    def loss(self, models: Predictors, batch: UnlearnBatch) -> MethodOutput:
        """Evaluate the student twice at the drawn step; only at the concept with a graph."""
        x, t = batch.latents, batch.timesteps
        (target,) = models.student(x, t, batch.anchor)
        (student,) = models.train(x, t, batch.trained)
        if self.cfg.train.loss_weighting == "epsilon":
            student, target = (models.noise.to_epsilon(each, x, t) for each in (student, target))
        difference = student.float() - target.float()
        return MethodOutput(difference.square().mean(), guided_prediction(models, batch, None, None))
