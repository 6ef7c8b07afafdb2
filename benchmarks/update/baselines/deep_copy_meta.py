"""A meta term the way that it is published: a whole copy of the model in every update, and one pass for every loss.

A second U-Net with an AdamW of its own, one forward and backward pass for each set before and after the attack, and a
buffer in which their gradients are added up. The mathematics is that of ``fastunlearn/meta``; it is not sharded, and
runs on one rank.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from fastunlearn.gradients.shard import GradientShard
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.retain import RetainBatch, noise_loss
from fastunlearn.schema.meta import SETS, meta_weights


class DeepCopyMeta:
    """Replaces ``MetaObjective.capture`` of a run at ZeRO stage 0 on one rank, with ``forbidden_loss`` "ascent"
    and an attack on all weights by AdamW."""

    def __init__(self, run: Any) -> None:
        self.run, self.meta = run, run.meta
        self.store: Any = getattr(getattr(run.engine, "transforms", None), "store", None)

    def capture(self, step: KeyStep, timestep: int) -> dict[str, Tensor]:
        """Copy, attack the copy, add up; the sum is put aside as the run's own term does."""
        run, meta = self.run, self.meta
        weights = meta_weights(run.cfg.meta)
        copy = UNet2DConditionModel.from_config(run.engine.sampler.config).requires_grad_(True)
        copy.load_state_dict(run.engine.sampler.state_dict())
        self._attack(copy, step)
        query = meta.sets.query_batch(step, timestep)
        total = {name: torch.zeros_like(parameter) for name, parameter in run.engine.named.items()}
        before = dict(zip(SETS, (0.0, *weights[:2]), strict=True))
        after = dict(zip(SETS, weights[2:], strict=True))
        found = {}
        for number, name in enumerate(SETS):
            chosen, b = query.set_B == number, query.batch
            batch = RetainBatch(
                b.latents[chosen], b.timesteps[chosen], b.cond.select(chosen), b.clean[chosen], b.noise[chosen]
            )
            found[f"meta_{name}_loss"] = self._add(total, copy, batch, after[name])
            if before[name]:
                self._add(total, run.engine.sampler, batch, before[name])
        self.store("meta", [GradientShard(name, gradient.reshape(-1)) for name, gradient in total.items()])
        return found

    def _attack(self, copy: nn.Module, step: KeyStep) -> None:
        optimizer = torch.optim.AdamW(copy.parameters(), lr=self.meta.attack.learning_rate, weight_decay=0.0)
        for batch in self.meta.sets.attack_batches(step):
            optimizer.zero_grad()
            self._loss(copy, batch).backward()
            optimizer.step()
        optimizer.zero_grad()

    def _add(self, total: dict[str, Tensor], unet: nn.Module, batch: RetainBatch, weight: float) -> Tensor:
        loss = self._loss(unet, batch)
        parameters = dict(unet.named_parameters())
        gradients = torch.autograd.grad(weight * loss, [parameters[name] for name in total], allow_unused=True)
        for buffer, gradient in zip(total.values(), gradients, strict=True):
            if gradient is not None:
                buffer += gradient
        return loss.detach()

    def _loss(self, unet: nn.Module, batch: RetainBatch) -> Tensor:
        models = self.run.models
        return noise_loss(models, batch, models.attacked(unet, batch.latents, batch.timesteps, batch.cond))
