"""What every optimizer says about itself. Its file imports torch and the library behind it only inside functions."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastunlearn.registry import OPTIMIZERS
from fastunlearn.schema.sections import OptimizerConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class OptimizerSpec:
    """The facts of one optimizer. A file in ``engines/optimizers/`` overrides what is not as it stands here."""

    name: str
    package: str = ""
    """Module that must be installed."""
    needs_gpu: bool = False
    fused_bits: int | None = None
    """Bits of the fused engine's moments under this name; None: that engine has no such optimizer."""
    offload_refusal: str | None = None
    """Why DeepSpeed's offload of the optimizer does not go with it; None: it does."""
    has_second_moment: bool = False
    """Whether it keeps one for each element, by which surgery.metric 'optimizer' weighs."""
    smaller: str | None = None
    """An optimizer that does the same with less memory, to be advised."""
    temporary_bytes: int = 0
    """Of each element of the group at hand, during the step."""
    dequantized_bytes: int = 0
    """Of each element of the largest group, where the second moments are read out of another form."""

    def availability(self, has_gpu: bool) -> str:
        """ "yes", or why it cannot be used on this machine."""
        if self.package and find_spec(self.package) is None:
            return f"no: {self.package} is not installed"
        return "no: needs an NVIDIA GPU" if self.needs_gpu and not has_gpu else "yes"

    def build(self, groups: list[dict], config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
        """The client optimizer that is handed to DeepSpeed."""
        raise NotImplementedError

    def after_sharding(self, flat_groups: list[Tensor], groups: list[dict]) -> None:
        """Once DeepSpeed has made flat partitions of the groups."""

    def second_moment(self, state: dict[str, Any]) -> Tensor:
        """AdamW's second moment in fp32, from the optimizer's state of one tensor.

        Only asked of one that has it.
        """
        return state["exp_avg_sq"]

    def state_bytes(self, numel: int, bits: int, sharded: bool) -> tuple[int, int]:
        """(on the device, paged to the host) for one tensor that it steps, of a group with ``bits``. ``sharded``:
        whether the tensor is a flat partition, for which ``after_sharding`` has been called."""
        raise NotImplementedError


def smallest_fused() -> str:
    """The optimizer whose moments are smallest under the fused engine."""
    bits = {name: spec.fused_bits for name, spec in OPTIMIZERS.items() if spec.fused_bits is not None}
    return min(bits, key=bits.__getitem__)


def offloadable() -> str:
    """The first optimizer that DeepSpeed can step on the host."""
    return next(name for name, spec in OPTIMIZERS.items() if spec.offload_refusal is None)


def adam_options(config: OptimizerConfig, learning_rate: float) -> dict[str, Any]:
    """The arguments that all AdamWs have in common."""
    return {
        "lr": learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
