"""The meta term of an update: what a simulated attack would find, as a gradient on top of the method's own.

Meta-Unlearning's objective (arXiv 2410.12777), in first order by default: the gradients of the losses at
the attacked weights are taken for gradients at the weights themselves.
The attack is in ``inner_loop.py``.

Legend: w the weights, w' the weights after the simulated attack; L_f, L_r, L_u the noise loss on forbidden, related and
unrelated pictures, the same pictures, noise and timesteps before and after:
    m = gradient of   - f L_f(w')  +  r (L_r(w) - L_r(w'))  +  u (L_u(w) - L_u(w'))
f, r, u are the three weights of the configuration. With ``forbidden_loss`` "erased", which is ours, + f E(w') stands in
the place of - f L_f(w'): E is the squared distance to a + g (a - c), c being what the original predicts and a what it
predicts once the concept is removed from the prompt, so that there is an end to it.
m is added after surgery: it is there to bend what happens after an attack, not to be projected away.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.engines.base import Engine
from fastunlearn.meta.image_sets import MetaSets, QueryBatch
from fastunlearn.meta.inner_loop import InnerLoop, all_trainable
from fastunlearn.meta.second_order import attacked_prediction
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.retain import RetainBatch
from fastunlearn.schema.meta import meta_weights
from fastunlearn.utils.distributed import World
from fastunlearn_kernels import weighted_noise_loss


class MetaObjective:
    """The term of one run."""

    def __init__(self, cfg: Config, models: Predictors, sets: MetaSets, engine: Engine, world: World) -> None:
        self.cfg, self.models, self.sets, self.engine = cfg, models, sets, engine
        self.attack = InnerLoop(cfg, engine.sampler, models, world)
        w, device = meta_weights(cfg.meta), world.device
        self._before = torch.tensor([0.0, w.before_related, w.before_unrelated], device=device)
        self._after = torch.tensor([w.after_forbidden, w.after_related, w.after_unrelated], device=device)
        # The engine divides by the number of micro-batches of the method's window.
        self._micro_batches = float(cfg.train.gradient_accumulation_steps)

    def is_due(self, step: KeyStep) -> bool:
        """Whether this update has the term."""
        return step.update % self.cfg.meta.every == 0

    def capture(self, step: KeyStep, timestep: int) -> dict[str, Tensor]:
        """Make this update's gradient of the term and store it; returns the losses for the log. Collective."""
        query = self.sets.query_batch(step, timestep)
        weights = self._before.tolist()
        phases: list[Callable[..., dict[str, Tensor]]] = [partial(self._attacked, step, query)]
        if any(weights):
            phases.append(partial(self._unharmed, query.without_forbidden()))
        found: dict[str, Tensor] = {}
        with self.engine.capture_gradient("meta"):
            for number, phase in enumerate(phases, start=1):
                found |= phase(last=number == len(phases))
        return found

    def _attacked(self, step: KeyStep, query: QueryBatch, *, last: bool) -> dict[str, Tensor]:
        """The losses after the attack, and their gradient."""
        goal = self._erased(query)  # made by frozen tensors that the attack would change
        batches = self.sets.attack_batches(step)
        if self.cfg.meta.order == "second":
            return self._attacked_in_second_order(batches, query, goal, last)
        with self.attack.applied(batches, seed=self.cfg.seed + (step.update << 20)):
            (prediction,) = self.models.train(query.batch.latents, query.batch.timesteps, query.batch.cond)
            loss, means = self._loss(prediction, query, self._after, goal)
            self.engine.backward(loss * self._micro_batches, last=last)
        return dict(zip(("meta_forbidden_loss", "meta_related_loss", "meta_unrelated_loss"), means, strict=True))

    def _attacked_in_second_order(
        self, batches: list[RetainBatch], query: QueryBatch, goal: Tensor | None, last: bool
    ) -> dict[str, Tensor]:
        named = self.engine.named
        with all_trainable(list(self.attack.attacked.values())):
            prediction = attacked_prediction(self.attack, batches, query.batch)
            loss, means = self._loss(prediction, query, self._after, goal)
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        # A loss whose gradient is the one at hand takes it through the engine's own reduction.
        carried = [(p * g.detach()).sum() for p, g in zip(named.values(), gradients, strict=True) if g is not None]
        self.engine.backward(torch.stack(carried).sum() * self._micro_batches, last=last)
        return dict(zip(("meta_forbidden_loss", "meta_related_loss", "meta_unrelated_loss"), means, strict=True))

    def _unharmed(self, query: QueryBatch, *, last: bool) -> dict[str, Tensor]:
        """The losses before the attack on what must be kept, and their gradient."""
        (prediction,) = self.models.train(query.batch.latents, query.batch.timesteps, query.batch.cond)
        loss, _ = self._loss(prediction, query, self._before, None)
        self.engine.backward(loss * self._micro_batches, last=last)
        return {}

    def _erased(self, query: QueryBatch) -> Tensor | None:
        """What the original predicts without the concept in the prompts, and beyond; None where nobody asks."""
        guidance, batch = self.cfg.meta.negative_guidance, query.batch
        if self.cfg.meta.ascends:
            return None
        if not guidance:
            return self.models.frozen(batch.latents, batch.timesteps, query.anchor)[0]
        anchor, concept = self.models.frozen(batch.latents, batch.timesteps, query.anchor, batch.cond)
        return anchor + guidance * (anchor - concept)

    def _loss(
        self, prediction: Tensor, query: QueryBatch, weights: Tensor, goal: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(weighted loss, mean of each set). ``goal``: what forbidden samples shall be predicted as, if not noise."""
        batch, process = query.batch, self.models.noise
        forbidden = weights * torch.tensor([1.0, 0.0, 0.0], device=weights.device)
        result = weighted_noise_loss(
            prediction, batch.noise, query.set_B, weights if goal is None else weights - forbidden, x0=batch.clean,
            **process.loss_arguments(batch.timesteps),
        )  # fmt: skip
        if goal is None:
            return result.loss, result.mean_S
        erased = weighted_noise_loss(prediction, goal, query.set_B, forbidden)
        return result.loss + erased.loss, result.mean_S + erased.mean_S
