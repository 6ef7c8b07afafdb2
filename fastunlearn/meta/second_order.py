"""The prediction after a simulated attack as a function of the weights before it: the exact meta gradient.

Steps of SGD that are themselves recorded, as a check of the first-order rule. For small models only: every step of the
attack keeps its whole graph and its weights.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastunlearn.meta.inner_loop import InnerLoop
from fastunlearn.sampling.retain import RetainBatch


def attacked_prediction(attack: InnerLoop, batches: list[RetainBatch], query: RetainBatch) -> Tensor:
    """Attack with plain SGD and predict ``query``; the graph reaches the weights before the attack.

    The attacked weights must require a gradient. One rank only: what other ranks add is not recorded.
    """
    weights: dict[str, Tensor] = dict(attack.attacked)
    for batch in batches:
        prediction = _predict(attack, weights, batch)
        gradients = torch.autograd.grad(
            _plain_noise_loss(attack, batch, prediction), list(weights.values()), create_graph=True, allow_unused=True
        )
        weights = {
            name: weight if gradient is None else weight - attack.learning_rate * gradient
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
    return _predict(attack, weights, query)


def _predict(attack: InnerLoop, weights: dict[str, Tensor], batch: RetainBatch) -> Tensor:
    call = functools.partial(_call, attack, weights)
    return attack.models.attacked(call, batch.latents, batch.timesteps, batch.cond)


def _call(attack: InnerLoop, weights: dict[str, Tensor], *args: Tensor, **kwargs: object) -> tuple[Tensor, ...]:
    return torch.func.functional_call(attack.unet, weights, args, kwargs)


def _plain_noise_loss(attack: InnerLoop, batch: RetainBatch, prediction: Tensor) -> Tensor:
    """As ``retain.noise_loss``, whose kernel has no second derivative."""
    assert batch.noise is not None and batch.clean is not None
    target = attack.models.noise.target(batch.noise, batch.clean, batch.timesteps)
    return (prediction - target).square().mean()
