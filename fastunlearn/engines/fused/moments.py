"""The fused engine's optimizer: the kernel package's AdamW, and its moments on the host where they are offloaded."""

from __future__ import annotations

import torch
from torch import nn

from fastunlearn.models import parameter_names
from fastunlearn.schema.sections import OptimizerConfig
from fastunlearn.utils.memory_rows import FP32, blocks_of
from fastunlearn_kernels import AdamW8bit


def fused_optimizer(
    parameters: list[nn.Parameter], config: OptimizerConfig, bits: int | None, learning_rate: float, seed: int
) -> AdamW8bit:
    """The kernel package's AdamW, for the fused engine: moments in 8 bits, small tensors apart, or with
    ``bits`` 32 in fp32."""
    group = {"params": parameters, "bits": bits}
    return AdamW8bit(
        [group], learning_rate, (config.adam_beta1, config.adam_beta2), config.adam_epsilon,
        config.adam_weight_decay, min_8bit_size=parameter_names.SMALL_TENSOR_NUMEL, seed=seed,
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


def moment_bytes(numel: int, bits: int | None) -> int:
    """Both moments of one tensor, with their scales."""
    if bits == 32 or parameter_names.is_small(numel):
        return 2 * FP32 * numel
    return 2 * numel + 2 * FP32 * blocks_of(numel)
