"""Client optimizers in parameter groups that suit ZeRO and bitsandbytes. The only file that knows bitsandbytes.

What this is: how trainable tensors are grouped, and which optimizer steps them.
What this is not: the sharding (``zero.py``) or the learning-rate plan (diffusers' schedulers, in ``zero.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastunlearn.config import OptimizerConfig
from fastunlearn_kernels import AdamW8bit

# bitsandbytes keeps the state of tensors below this size in 32 bits. ZeRO flattens a whole group into one tensor, so
# norms and biases need a group of their own to keep that protection.
SMALL_TENSOR_NUMEL = 4096
# bitsandbytes counts elements in int32; half of that leaves room for padding.
MAX_GROUP_NUMEL = 2**30
LAYER = re.compile(r"(?:(?:down|up)_blocks\.\d+|mid_block)\.[a-z]+\.\d+(?:\.transformer_blocks\.\d+)?")


def is_small(numel: int) -> bool:
    """Whether a tensor of this size is a norm or a bias, and its moments stay in 32 bits."""
    return numel < SMALL_TENSOR_NUMEL


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict]:
    """Split trainable parameters into groups: small tensors apart, and no group above ``MAX_GROUP_NUMEL`` elements."""
    small: list[nn.Parameter] = []
    large: list[list[nn.Parameter]] = [[]]
    filled = 0
    for _, parameter in named_parameters:
        if is_small(parameter.numel()):
            small.append(parameter)
            continue
        if filled + parameter.numel() > MAX_GROUP_NUMEL and large[-1]:
            large.append([])
            filled = 0
        large[-1].append(parameter)
        filled += parameter.numel()
    groups = [{"params": group, "name": f"matrices{i}", "bits": 8} for i, group in enumerate(large) if group]
    if small:
        groups.append({"params": small, "name": "small", "bits": 32})
    return groups


def layer_of(name: str, numel: int) -> str:
    """What the fused engine steps together with a parameter: the matrices of a transformer block or a ResNet block,
    whose gradients arrive one after the other; and all small tensors of the model, for the sake of few launches."""
    if is_small(numel):
        return "small"
    found = LAYER.match(name)
    return found[0] if found else name.partition(".")[0]


def split_note(groups: list[dict]) -> str | None:
    """A line for the user where ``MAX_GROUP_NUMEL`` made several groups out of one; None where it did not."""
    large = [sum(p.numel() for p in group["params"]) for group in groups if group["bits"] == 8]
    if len(large) < 2:
        return None
    sizes = ", ".join(f"{size:,}" for size in large)
    return f"optimizer: {len(large)} groups of {sizes} parameters, because a group may hold {MAX_GROUP_NUMEL:,}"


def build_optimizer(groups: list[dict], config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
    """The client optimizer that is handed to DeepSpeed: torch AdamW, or bitsandbytes' 8-bit (paged) AdamW."""
    options: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    if config.name == "adamw":
        # The same arithmetic on every world size and stage: one tensor at a time, no fused or multi-tensor variants.
        return torch.optim.AdamW(groups, foreach=False, **options)
    import bitsandbytes as bnb  # slow to import, so only where it is asked for

    kind = bnb.optim.PagedAdamW8bit if config.name == "paged_adamw8bit" else bnb.optim.AdamW8bit
    return kind(groups, **options)


def fused_optimizer(
    parameters: list[nn.Parameter], config: OptimizerConfig, learning_rate: float, seed: int
) -> AdamW8bit:
    """The kernel package's AdamW, for the fused engine: moments in 8 bits, small tensors apart, or in fp32."""
    group = {"params": parameters, "bits": 32 if config.name == "adamw" else 8}
    return AdamW8bit(
        [group], learning_rate, (config.adam_beta1, config.adam_beta2), config.adam_epsilon,
        config.adam_weight_decay, min_8bit_size=SMALL_TENSOR_NUMEL, seed=seed,
    )  # fmt: skip


class HostMoments:
    """Moves the moments of one optimizer between host and device, around its step."""

    KEYS = ("state1", "state2", "absmax1", "absmax2")

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._host: dict[tuple[int, str], torch.Tensor] = {}

    def fetch(self, device: torch.device) -> None:
        """Before the step: to the device."""
        for state in self._optimizer.state.values():
            for key in self.KEYS:
                if key in state:
                    state[key] = state[key].to(device, non_blocking=True)

    def put_back(self) -> None:
        """After the step: into the same host memory each time, page-locked where there is a GPU. The host does not wait
        for the copies; the next ``fetch`` comes after them in the device's order."""
        for parameter, state in self._optimizer.state.items():
            for key in self.KEYS:
                if key not in state:
                    continue
                own = self._host.get((id(parameter), key))
                if own is None:
                    own = torch.empty_like(state[key], device="cpu", pin_memory=state[key].is_cuda)
                    self._host[id(parameter), key] = own
                state[key] = own.copy_(state[key], non_blocking=True)


def keep_small_groups_in_32_bit(flat_groups: list[torch.Tensor], groups: list[dict]) -> None:
    """Tell bitsandbytes to keep 32-bit state for the flat partitions that hold norms and biases.

    The override is keyed by tensor identity, so it must name the flat partitions that exist after
    ``deepspeed.initialize``, not the parameters that were handed in.
    """
    import bitsandbytes as bnb

    manager = bnb.optim.GlobalOptimManager.get_instance()
    for flat, group in zip(flat_groups, groups, strict=True):
        if group["bits"] == 32:
            manager.override_config(flat, "optim_bits", 32)
