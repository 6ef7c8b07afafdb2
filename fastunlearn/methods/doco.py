"""DoCo, Concept Domain Correction (arXiv 2405.15304): make the concept indistinguishable from its anchor.

What this is: the adversarial loss between image estimates, and the discriminator's own turn.
What this is not: the surgery that keeps it from harming what is kept (``surgery.py``), or the retain loss.

Legend, at latents x_t noised from a picture of the anchor; s the student, e the frozen model, A = alpha-bar, D the
patch discriminator; X(v) is the image that a noise prediction v implies:
    u = s(x_t, t, prompt with the concept)      a = e(x_t, t, anchor prompt)
    X(v) = (x_t - sqrt(1 - A) v) / sqrt(A)
    L_adv = BCE(D(X(u)), 0)                                     the student, D left alone
    L_D   = BCE(D(X(u)), 1) + BCE(D(X(a)), 0)                   D, on the same predictions, in every update
With ``doco.guidance_scale`` w other than 1, which is ours, D sees what a guided sampler would: n + w (v - n) in the
place of v, with n = e(x_t, t, unconditional prompt) on both sides. What is left of the concept is then as loud to D as
it would be in a picture.
The student joins after ``doco.discriminator_warmup`` updates. Until then its predictions are made without a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastunlearn.config import Config, resolved_start, resolved_steps
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.methods.base import Method, MethodOutput
from fastunlearn.methods.parts.discriminator import DiscriminatorTrainer
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.rollout import UnlearnBatch
from fastunlearn_kernels import to_epsilon


class DoCo(Method):
    """Adversarial erasure on noised anchor pictures."""

    trajectories = False

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.judge: DiscriminatorTrainer | None = None
        self._saved: dict | None = None
        self.judge_losses: list[Tensor] = []

    def table(self) -> list[KeyStep]:
        """Concepts take turns; the index is the first key step, from which key timesteps are drawn."""
        cfg = self.cfg
        starts = [resolved_start(cfg, cfg.kind_of(concept)) for concept in cfg.concepts]
        return [
            KeyStep(update=i, concept=i % len(starts), index=starts[i % len(starts)], restart=False, continues=False)
            for i in range(resolved_steps(cfg))
        ]

    def loss(self, models: Predictors, window: UnlearnBatch) -> MethodOutput:
        """The student's side, and the gradient of the discriminator's, which ``finish`` applies."""
        judge = self._judge(models, window.latents)
        x, t = window.latents, window.timestep
        assert isinstance(t, Tensor)
        warming_up = not window.trains
        (student,) = (models.rollout if warming_up else models.train)(x, t, window.trained)
        anchor, student = self._guided(models, window, student)
        concept, anchor = (self._shown(predicted_x0(models, v, x, t), x) for v in (student, anchor))
        loss = None if warming_up else judge.generator_loss(concept, t)
        # The graph to the student is used up by its own backward pass, so the discriminator's turn comes on a copy.
        share = 1.0 / self.cfg.train.gradient_accumulation_steps
        self.judge_losses.append(judge_turn(judge, concept.detach(), anchor, t, share))
        return MethodOutput(loss, None)

    def _guided(self, models: Predictors, window: UnlearnBatch, student: Tensor) -> tuple[Tensor, Tensor]:
        """The frozen model's prediction at the anchor and the student's, both guided alike."""
        scale = self.cfg.doco.guidance_scale
        if scale == 1.0:
            (anchor,) = models.frozen(window.latents, window.timestep, window.anchor)
            return anchor, student
        anchor, uncond = models.frozen(window.latents, window.timestep, window.anchor, window.uncond)
        n, a, u = uncond.float(), anchor.float(), student.float()  # guidance would amplify the rounding of bf16
        return n + scale * (a - n), n + scale * (u - n)

    def finish(self) -> dict[str, Tensor]:
        """The discriminator's step, after the student's."""
        assert self.judge is not None
        self.judge.step()
        losses, self.judge_losses = torch.stack(self.judge_losses), []
        return {"discriminator_loss": losses.mean()}

    def state_dict(self) -> dict:
        """The discriminator."""
        return {} if self.judge is None else self.judge.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Kept until the first window tells the shape."""
        self._saved = state or None

    def _shown(self, estimate: Tensor, latents: Tensor) -> Tensor:
        """What the discriminator sees of an estimate: a conditional one also sees what it was made from, so that the
        two estimates of a pair can be told apart by a difference that no whole set of pictures would show."""
        return torch.cat([estimate, latents.float()], 1) if self.cfg.doco.discriminator == "conditional" else estimate

    def _judge(self, models: Predictors, latents: Tensor) -> DiscriminatorTrainer:
        if self.judge is None:
            doco = self.cfg.doco
            channels = shown_channels(self.cfg, latents.shape[1])
            self.judge = DiscriminatorTrainer(
                channels, latents.shape[-1], latents.device, released=doco.discriminator == "released",
                learning_rate=doco.discriminator_learning_rate, seed=self.cfg.seed,
            )  # fmt: skip
            if self._saved is not None:
                self.judge.load_state_dict(self._saved)
        return self.judge


def shown_channels(cfg: Config, latent_channels: int) -> int:
    """What the discriminator is shown: an estimate, and the noisy latents behind it where it is a conditional one."""
    return latent_channels * (2 if cfg.doco.discriminator == "conditional" else 1)


def judge_turn(judge: DiscriminatorTrainer, concept: Tensor, anchor: Tensor, timesteps: Tensor, share: float) -> Tensor:
    """The discriminator's gradient on predictions that carry none."""
    with torch.enable_grad():
        return judge.discriminator_loss(concept, anchor, timesteps, share)


def predicted_x0(models: Predictors, prediction: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
    """X(v) in fp32: the clean image that a prediction at these latents implies."""
    alphas = models.backbone.alphas_cumprod[timesteps]
    noise = to_epsilon(prediction, latents, alphas, models.backbone.prediction_type).float()
    alpha = alphas.view(-1, 1, 1, 1)
    return (latents.float() - (1 - alpha).sqrt() * noise) / alpha.sqrt()
