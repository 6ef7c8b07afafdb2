"""DoCo, Concept Domain Correction (arXiv 2405.15304): make the concept indistinguishable from its anchor.

An adversarial loss between image estimates, and the discriminator's own turn. The surgery that keeps it from harming
what is kept, which DoCo always uses, is in ``gradients/``.

Legend, at latents x_t noised from a picture of the anchor; s the student, e the frozen model, A = alpha-bar, D the
patch discriminator; X(v) is the image that a noise prediction v implies:
    u = s(x_t, t, prompt with the concept)      a = e(x_t, t, anchor prompt)
    X(v) = (x_t - sqrt(1 - A) v) / sqrt(A)          of a v-model: sqrt(A) x_t - sqrt(1 - A) v
    L_adv = BCE(D(X(u)), 0)                                     the student, D left alone
    L_D   = BCE(D(X(u)), 1) + BCE(D(X(a)), 0)                   D, on the same predictions, in every update
With ``doco.guidance_scale`` w other than 1, which is ours, D sees what a guided sampler would: n + w (v - n)
instead of v, with n = e(x_t, t, unconditional prompt) on both sides. What is left of the concept is then as loud to D
as it would be in a picture.
The student joins after ``doco.discriminator_warmup`` updates. Until then its predictions are made without a graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from fastunlearn.errors import UserError
from fastunlearn.methods.base import AnchorTimesteps, Method, MethodOutput, MethodSpec, UNetCalls
from fastunlearn.methods.kscu import first_key_steps
from fastunlearn.prompts.variants import concept_variants
from fastunlearn.sampling.batch import UnlearnBatch
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.schema.fields import ConfigModel, NonNegativeInt, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor

    from fastunlearn.config import Config
    from fastunlearn.denoisers.predictors import Predictors
    from fastunlearn.methods.parts.discriminator import DiscriminatorTrainer


class DocoConfig(ConfigModel):
    """Concept Domain Correction (arXiv 2405.15304)."""

    discriminator: Literal["timestep", "conditional", "released"] = "timestep"
    """timestep: told the timestep, with group norm; conditional: also shown the noisy latents behind each estimate;
    released: as published, without either and with batch norm."""
    discriminator_learning_rate: PositiveFloat = 5e-4
    """Adam's rate for the discriminator; published: 5e-4 for styles, 1e-4 for objects and nudity."""
    discriminator_warmup: NonNegativeInt = 1000
    """Updates in which only the discriminator learns."""
    timesteps: Literal["uniform", "key"] = "uniform"
    """Timesteps of the noised pictures: all, or the sampler's from the key step on, where estimates are less loud."""
    min_timestep: Annotated[int, Field(ge=0, lt=1000)] = 0
    """Smallest of the uniform timesteps. Larger: only the noisy end, where what a prompt asks for is settled."""
    guidance_scale: Annotated[float, Field(ge=1)] = 1.0
    """Guidance of the predictions that the discriminator compares; 1: the published rule, at which it sees least."""
    stop_bos_gradient: bool = False
    """As published: no gradient through the keys and values of the first token."""


class DocoSpec(MethodSpec):
    """The facts of the method."""

    title = "DoCo, Concept Domain Correction"
    paper = "2405.15304"
    Settings = DocoConfig
    steps = 2000
    scope = "attn2_kv"
    samples = "anchors"
    always_retains = True
    retain_source = "anchors"
    retain_timesteps = "uniform"

    def first_student_update(self, cfg: Config) -> int:
        """Before it only the discriminator learns."""
        return cfg.doco.discriminator_warmup

    def calls(self, cfg: Config) -> UNetCalls:
        """The frozen model at the anchor and, where predictions are guided, unconditionally."""
        frozen = 1 if cfg.doco.guidance_scale == 1.0 else 2
        return UNetCalls(teacher=frozen, trained=1, beside=frozen)

    def anchor_timesteps(self, cfg: Config) -> AnchorTimesteps:
        """As ``doco.timesteps`` says."""
        return AnchorTimesteps(cfg.doco.timesteps == "uniform", cfg.doco.min_timestep)

    def stops_first_token_gradient(self, cfg: Config) -> bool:
        """As published, where it is asked for."""
        return cfg.doco.stop_bos_gradient

    def memory_rows(self, cfg: Config, latent_channels: int, latent_size: int) -> list[tuple[str, int]]:
        """The discriminator with its gradient and Adam's two moments, all fp32."""
        import torch

        from fastunlearn.methods.parts.discriminator import Discriminator

        with torch.device("meta"):
            network = Discriminator(
                shown_channels(cfg, latent_channels), latent_size,
                released=cfg.doco.discriminator == "released", seed=cfg.seed,
            )  # fmt: skip
        return [("discriminator and its Adam", 16 * sum(p.numel() for p in network.parameters()))]

    def refuse(self, cfg: Config) -> None:
        """A concept without an anchor, and settings that contradict each other."""
        from fastunlearn.config.base import named_concepts  # which reads the settings of this file

        for concept in named_concepts(cfg):
            if not any(pair.anchor for pair in concept_variants(concept, cfg.prompts)):
                raise UserError(
                    f"concepts: {concept.name!r} has no anchor; method 'doco' draws pictures of what is to take its "
                    "place, so give the concept an anchor, or prompts.anchor_templates"
                )
        if cfg.doco.timesteps == "key" and cfg.doco.min_timestep > 0:
            raise UserError(
                f"doco.min_timestep: {cfg.doco.min_timestep} is for uniform timesteps; key ones have an end of their "
                "own. Drop it, or set doco.timesteps to 'uniform'"
            )
        if cfg.max_train_steps - cfg.doco.discriminator_warmup < 1:
            raise UserError(
                f"doco.discriminator_warmup: {cfg.doco.discriminator_warmup} leaves no update for the model; "
                f"train.max_train_steps is {cfg.max_train_steps}"
            )


class DoCo(Method):
    """Adversarial erasure on noised anchor pictures."""

    spec = DocoSpec()

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.discriminator: DiscriminatorTrainer | None = None
        self._saved: dict | None = None
        self.discriminator_losses: list[Tensor] = []

    def table(self) -> list[KeyStep]:
        """Concepts take turns; the index is the first key step, from which key timesteps are drawn."""
        starts = first_key_steps(self.cfg)
        return [
            KeyStep(update=i, concept=i % len(starts), index=starts[i % len(starts)], restart=False, continues=False)
            for i in range(self.cfg.max_train_steps)
        ]

    def loss(self, models: Predictors, batch: UnlearnBatch) -> MethodOutput:
        """The student's side, and the gradient of the discriminator's, which ``finish`` applies."""
        import torch

        discriminator = self._get_discriminator(batch.latents)
        x, t = batch.latents, batch.timesteps
        warming_up = not batch.trains
        (student,) = (models.rollout if warming_up else models.train)(x, t, batch.trained)
        anchor, student = self._guided(models, batch, student)
        concept, anchor = (self._shown(models.noise.to_x0(v, x, t), x) for v in (student, anchor))
        loss = None if warming_up else discriminator.generator_loss(concept, t)
        # The graph to the student is used up by its own backward pass, so the discriminator's turn comes on a copy.
        share = 1.0 / self.cfg.train.gradient_accumulation_steps
        with torch.enable_grad():
            self.discriminator_losses.append(discriminator.discriminator_loss(concept.detach(), anchor, t, share))
        return MethodOutput(loss, None)

    def _guided(self, models: Predictors, batch: UnlearnBatch, student: Tensor) -> tuple[Tensor, Tensor]:
        """The frozen model's prediction at the anchor and the student's, both guided alike."""
        scale = self.cfg.doco.guidance_scale
        if scale == 1.0:
            (anchor,) = models.frozen(batch.latents, batch.timesteps, batch.anchor)
            return anchor, student
        anchor, uncond = models.frozen(batch.latents, batch.timesteps, batch.anchor, batch.uncond)
        n, a, u = uncond.float(), anchor.float(), student.float()  # guidance would amplify the rounding of bf16
        return n + scale * (a - n), n + scale * (u - n)

    def finish(self) -> dict[str, Tensor]:
        """The discriminator's step, after the student's."""
        import torch

        assert self.discriminator is not None
        self.discriminator.step()
        losses, self.discriminator_losses = torch.stack(self.discriminator_losses), []
        return {"discriminator_loss": losses.mean()}

    def state_dict(self) -> dict[str, Any]:
        """The discriminator."""
        return {} if self.discriminator is None else self.discriminator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Kept until the first batch tells the shape."""
        self._saved = state or None

    def _shown(self, estimate: Tensor, latents: Tensor) -> Tensor:
        """What the discriminator sees of an estimate: a conditional one also sees what it was made from, so that the
        two estimates of a pair can be told apart by a difference that no whole set of pictures would show."""
        import torch

        return torch.cat([estimate, latents.float()], 1) if self.cfg.doco.discriminator == "conditional" else estimate

    def _get_discriminator(self, latents: Tensor) -> DiscriminatorTrainer:
        from fastunlearn.methods.parts.discriminator import DiscriminatorTrainer

        if self.discriminator is None:
            doco = self.cfg.doco
            self.discriminator = DiscriminatorTrainer(
                shown_channels(self.cfg, latents.shape[1]), latents.shape[-1], latents.device,
                released=doco.discriminator == "released", learning_rate=doco.discriminator_learning_rate,
                seed=self.cfg.seed, max_skipped=self.cfg.surgery.max_skipped_updates,
            )  # fmt: skip
            if self._saved is not None:
                self.discriminator.load_state_dict(self._saved)
        return self.discriminator


def shown_channels(cfg: Config, latent_channels: int) -> int:
    """What the discriminator is shown: an estimate, and the noisy latents behind it where it is a conditional one."""
    return latent_channels * (2 if cfg.doco.discriminator == "conditional" else 1)
