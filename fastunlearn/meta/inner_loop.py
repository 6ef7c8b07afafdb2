"""The simulated attack: a few steps of ordinary fine-tuning on forbidden pictures, in place, and the way back.

Inside ``with attack.applied(batches)`` the U-Net's weights are those that an attacker would have. It works on the
weights themselves, behind the engine's back: what DeepSpeed accumulates and steps is left alone. The losses that are
taken inside are in ``objective.py``, attacks on a finished model in ``evaluation/attacks/``.

On several ranks every rank takes the same steps, by the mean of their gradients. With ``restart_every`` 1 the
attacker starts from the weights as they are, each time. Above that it continues from where it was, as far from the
weights as then and with the optimizer state of then: an attack of many steps for the price of a few in an update.
bf16 weights are rounded stochastically, with moments in 8 bits: at an attacker's learning rate, rounding to nearest
would undo almost every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastunlearn.config import Config
from fastunlearn.denoisers.lora import low_rank
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.engines.fused.moments import fused_optimizer
from fastunlearn.sampling.retain import RetainBatch, noise_loss
from fastunlearn.schema.sections import OptimizerConfig
from fastunlearn.utils.distributed import World, mean_over_ranks


class InnerLoop:
    """Fine-tuning of a U-Net that is undone again."""

    def __init__(self, cfg: Config, unet: nn.Module, models: Predictors, world: World) -> None:
        """``unet``: the bare module whose weights the engine also holds, with the trained ones requiring a gradient."""
        self.cfg, self.unet, self.models, self.world = cfg, unet, models, world
        self.learning_rate = cfg.attack_learning_rate
        self.attacked: dict[str, nn.Parameter] = {
            name: parameter
            for name, parameter in unet.named_parameters()
            if cfg.meta.inner_scope == "full" or parameter.requires_grad
        }
        self._terms = 0
        self._offset: list[Tensor] = []
        """How far the attacker's weights are from the run's, while one continues."""
        self._optimizer: torch.optim.Optimizer | None = None
        self._seed = 0

    @contextlib.contextmanager
    def applied(self, batches: Sequence[RetainBatch], seed: int) -> Iterator[None]:
        """Inside, the weights are attacked; afterwards they are, bit for bit, what they were. Collective.

        ``seed``: of the stochastic rounding of bf16 weights, and of the adapters' start.
        """
        if self.cfg.meta.inner_scope == "lora":
            with low_rank(self.unet, self.cfg.meta.lora_rank, seed) as added:
                parameters = [p for pair in added for p in pair.parameters()]
                self._fine_tune(self._fresh_optimizer(parameters, seed), parameters, batches)
                yield
            return
        parameters = list(self.attacked.values())
        before = [parameter.detach().clone() for parameter in parameters]
        self._terms += 1
        try:
            self._resume(parameters, batches, seed)
            yield
        finally:
            self._restore(parameters, before)

    @property
    def _resumes(self) -> bool:
        """Whether the next term's attack begins where this one ends."""
        return self._terms % self.cfg.meta.steps_per_attack != 0

    def _resume(self, parameters: list[nn.Parameter], batches: Sequence[RetainBatch], seed: int) -> None:
        for parameter, distance in zip(parameters, self._offset, strict=bool(self._offset)):
            parameter.data.add_(distance)
        self._offset = []
        if self._optimizer is None:
            self._optimizer, self._seed = self._fresh_optimizer(parameters, seed), seed
        with all_trainable(parameters):
            self._fine_tune(self._optimizer, parameters, batches)
        if not self._resumes:
            self._optimizer = None

    def _restore(self, parameters: list[nn.Parameter], before: list[Tensor]) -> None:
        """Where the attack continues, the copy of each weight makes room for how far it came."""
        for number, (parameter, original) in enumerate(zip(parameters, before, strict=True)):
            if self._resumes:
                before[number] = parameter.data - original
            parameter.data.copy_(original)
        self._offset = before if self._resumes else []

    def state_dict(self) -> dict:
        """Of an attacker who continues."""
        if self._optimizer is None:
            return {"terms": self._terms} if self._terms else {}
        state = {"gone": self._offset, "seed": self._seed, "optimizer": self._optimizer.state_dict()}
        return {"terms": self._terms, **state}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of ``state_dict``."""
        self._terms = state["terms"]
        if "optimizer" in state:
            parameters = list(self.attacked.values())
            self._offset = [gone.to(p.device) for gone, p in zip(state["gone"], parameters, strict=True)]
            self._seed = state["seed"]
            self._optimizer = self._fresh_optimizer(parameters, self._seed)
            self._optimizer.load_state_dict(state["optimizer"])

    def _fine_tune(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], batches: Sequence[RetainBatch]
    ) -> None:
        for batch in batches:
            loss = noise_loss(self.models, batch, self._prediction(batch))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = self._mean(torch.zeros_like(parameter) if gradient is None else gradient)
            del gradients
            optimizer.step()
            for parameter in parameters:
                parameter.grad = None

    def _prediction(self, batch: RetainBatch) -> Tensor:
        return self.models.attacked(self.unet, batch.latents, batch.timesteps, batch.cond)

    def _fresh_optimizer(self, parameters: list[nn.Parameter], seed: int) -> torch.optim.Optimizer:
        rate = self.learning_rate
        if self.cfg.meta.inner_optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=rate)
        if self.cfg.bf16_weights:
            return fused_optimizer(parameters, OptimizerConfig(), 8, rate, seed)
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, foreach=False)

    def _mean(self, gradient: Tensor) -> Tensor:
        if self.world.world_size == 1:
            return gradient
        return mean_over_ranks(gradient.float()).to(gradient.dtype)


@contextlib.contextmanager
def all_trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, all of them require a gradient; afterwards those that did."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
