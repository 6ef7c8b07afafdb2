"""The retain gradient between its window and the projection: its dtype, its place, and its running mean.

What this is: storage for a list of tensors, all of this rank's (``surgery.py``) or those of one layer (``fused.py``).
What this is not: where the gradient comes from, or what is done with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastunlearn.config import SurgeryConfig
from fastunlearn_kernels import Quantized, blockwise_dequantize, blockwise_quantize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class GradientBuffer:
    """One retain gradient, or with ``surgery.retain_ema`` its running mean."""

    def __init__(self, cfg: SurgeryConfig, stream: int = 0) -> None:
        """``stream``: another one for each list of tensors, so that they are not rounded with the same random bits."""
        self._cfg = cfg
        self._stream = stream
        self._kept: list[Tensor] | Quantized | None = None
        self._windows = 0

    @property
    def there(self) -> bool:
        """Whether there is one."""
        return self._kept is not None

    @property
    def bias_correction(self) -> float:
        """A running mean that starts at zero is too small by this factor."""
        return 1.0 - self._cfg.retain_ema**self._windows if self._cfg.retain_ema else 1.0

    def keep(self, fresh: list[Tensor]) -> None:
        """Take over a retain gradient, into its running mean if there is one, in the dtype and place configured."""
        decay = self._cfg.retain_ema
        if decay and self._kept is not None:
            place = fresh[0].device if fresh else torch.device("cpu")
            means = _moved(self._dequantized(torch.float32), place)
            fresh = [mean.lerp(new.to(mean.dtype), 1 - decay) for mean, new in zip(means, fresh, strict=True)]
        elif decay:
            fresh = [(1 - decay) * new.to(torch.float32) for new in fresh]
        self._windows += 1
        self._kept = self._stored(fresh)

    def add(self, fresh: list[Tensor]) -> None:
        """Take over a gradient on top of the one that is kept, if there is one."""
        if self._kept is not None:
            place = fresh[0].device if fresh else torch.device("cpu")
            before = _moved(self._dequantized(torch.float32), place)
            fresh = [(old + new.to(old.dtype)).to(new.dtype) for old, new in zip(before, fresh, strict=True)]
        self.keep(fresh)

    def at(self, place: torch.device) -> list[Tensor] | Quantized:
        """The kept gradient on this device."""
        if self._kept is None:
            raise RuntimeError("a projection before keep(): there is no retain gradient yet")
        if isinstance(self._kept, Quantized):
            return Quantized(_moved(self._kept.codes, place), _moved(self._kept.absmax, place))
        return _moved(self._kept, place)

    def release(self) -> None:
        """After the projection: the optimizer's step is where memory peaks, and the next window makes a new one."""
        if not self._cfg.retain_ema:
            self._kept = None

    def forget(self) -> None:
        """Begin anew, also a running mean: what is not finite would never leave it."""
        self._kept, self._windows = None, 0

    def state_dict(self) -> dict[str, Tensor]:
        """The running mean, if there is one; without one each update makes its retain gradient anew."""
        if not self._cfg.retain_ema or self._kept is None:
            return {}
        return {f"retain.{i}": tensor.cpu() for i, tensor in enumerate(self._dequantized(torch.float32))} | {
            "windows": torch.tensor(self._windows)
        }

    def load_state_dict(self, state: dict[str, Tensor], place: torch.device) -> None:
        """Continue a saved running mean."""
        if not state:
            return
        self._windows = int(state["windows"])
        self._kept = self._stored([state[f"retain.{i}"].to(place) for i in range(len(state) - 1)])

    def _stored(self, tensors: list[Tensor]) -> list[Tensor] | Quantized:
        cfg = self._cfg
        place = torch.device("cpu") if cfg.retain_device == "host" else None
        if cfg.retain_dtype == "int8":
            # Rounding to nearest would never let a running mean take a step smaller than half a code.
            seed = self._windows + (self._stream << 32)
            kept = blockwise_quantize(tensors, stochastic=bool(cfg.retain_ema), seed=seed)
            return kept if place is None else Quantized(_moved(kept.codes, place), _moved(kept.absmax, place))
        if cfg.retain_dtype != "auto":
            tensors = [tensor.to(DTYPES[cfg.retain_dtype]) for tensor in tensors]
        return tensors if place is None else _moved(tensors, place)

    def _dequantized(self, dtype: torch.dtype) -> list[Tensor]:
        if isinstance(self._kept, Quantized):
            return blockwise_dequantize(self._kept, dtype)
        return [tensor.to(dtype) for tensor in self._kept or []]


def _moved(tensors: Sequence[Tensor], place: torch.device) -> list[Tensor]:
    return [tensor.to(place, non_blocking=True) for tensor in tensors]
