"""A gradient between its own backward pass and the one that it waits for: its dtype, its place, its average.

Storage for a list of tensors: all of this rank's (``transforms.py``), or those of one layer (``engines/fused``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastunlearn.utils.dtypes import DTYPES
from fastunlearn.utils.memory_rows import quantized_nbytes
from fastunlearn_kernels import Quantized, blockwise_dequantize, blockwise_quantize


class GradientBuffer:
    """One gradient that waits for another, or the exponential average of such."""

    def __init__(
        self, dtype: str = "auto", device: str = "device", ema: float = 0.0, stream: int = 0, watched: bool = False
    ) -> None:
        """
        Args:
            dtype: "fp32", "bf16", "int8" (256 elements share a scale), or "auto": as it comes.
            device: "device", or "host".
            ema: decay of an exponential average of what is stored; 0: none.
            stream: another one for each list of tensors, so that they are not rounded with the same random bits.
            watched: whether ``finite`` is wanted.
        """
        self.dtype, self.device, self.ema = dtype, device, ema
        self._stream = stream
        self._stored: list[Tensor] | Quantized | None = None
        self._count = 0
        self.finite: Tensor | None = None
        """Where it is watched: whether all that is kept is finite, as one bool that is still on the device."""
        self._watched = watched

    @property
    def is_filled(self) -> bool:
        """Whether there is one."""
        return self._stored is not None

    @property
    def bias_correction(self) -> float:
        """An average that starts at zero is too small by this factor."""
        return 1.0 - self.ema**self._count if self.ema else 1.0

    def store(self, fresh: list[Tensor]) -> None:
        """Take over a gradient, into its average if there is one, in the dtype and place configured."""
        decay = self.ema
        if decay and self._stored is not None:
            place = fresh[0].device if fresh else torch.device("cpu")
            means = _moved(self._dequantized(torch.float32), place)
            fresh = [mean.lerp(new.to(mean.dtype), 1 - decay) for mean, new in zip(means, fresh, strict=True)]
        elif decay:
            fresh = [(1 - decay) * new.to(torch.float32) for new in fresh]
        self._count += 1
        self._stored = self._converted(fresh)

    def add(self, fresh: list[Tensor]) -> None:
        """Take over a gradient on top of the one that is kept, if there is one."""
        if self._stored is not None:
            place = fresh[0].device if fresh else torch.device("cpu")
            before = _moved(self._dequantized(torch.float32), place)
            fresh = [(old + new.to(old.dtype)).to(new.dtype) for old, new in zip(before, fresh, strict=True)]
        self.store(fresh)

    def on(self, place: torch.device) -> list[Tensor] | Quantized:
        """The kept gradient on this device."""
        if self._stored is None:
            raise RuntimeError("a projection before store(): there is no retain gradient yet")
        if isinstance(self._stored, Quantized):
            return Quantized(_moved(self._stored.codes, place), _moved(self._stored.absmax, place))
        return _moved(self._stored, place)

    def free(self) -> None:
        """After the projection: the optimizer's step is where memory peaks, and the next window makes a new one."""
        if not self.ema:
            self._stored = None

    def reset(self) -> None:
        """Begin anew, also an average: what is not finite would never leave it."""
        self._stored, self._count, self.finite = None, 0, None

    def state_dict(self) -> dict[str, Tensor]:
        """The average, if there is one; without one each update makes its gradient anew."""
        if not self.ema or self._stored is None:
            return {}
        return {f"retain.{i}": tensor.cpu() for i, tensor in enumerate(self._dequantized(torch.float32))} | {
            "windows": torch.tensor(self._count)
        }

    def load_state_dict(self, state: dict[str, Tensor], place: torch.device) -> None:
        """Continue a saved average."""
        if not state:
            return
        self._count = int(state["windows"])
        self._stored = self._converted([state[f"retain.{i}"].to(place) for i in range(len(state) - 1)])

    def _converted(self, tensors: list[Tensor]) -> list[Tensor] | Quantized:
        place = torch.device("cpu") if self.device == "host" else None
        if self.dtype == "int8":
            # Rounding to nearest would never let an average take a step smaller than half a code.
            seed = self._count + (self._stream << 32)
            kept = blockwise_quantize(tensors, stochastic=bool(self.ema), seed=seed)
            self._watch(kept.absmax)  # a block's scale says it of 256 elements
            return kept if place is None else Quantized(_moved(kept.codes, place), _moved(kept.absmax, place))
        if self.dtype != "auto":
            tensors = [tensor.to(DTYPES[self.dtype]) for tensor in tensors]
        self._watch(tensors)
        return tensors if place is None else _moved(tensors, place)

    def _watch(self, tensors: Sequence[Tensor]) -> None:
        """Before they leave the device. A largest magnitude cannot overflow as a sum of squares could."""
        filled = [tensor for tensor in tensors if tensor.numel()]
        if self._watched and filled:
            self.finite = torch.stack(torch._foreach_norm(filled, torch.inf)).isfinite().all()

    def _dequantized(self, dtype: torch.dtype) -> list[Tensor]:
        if isinstance(self._stored, Quantized):
            return blockwise_dequantize(self._stored, dtype)
        return [tensor.to(dtype) for tensor in self._stored or []]


def stored_nbytes(dtype: str, numel: int, as_it_came: int) -> int:
    """Bytes of one tensor in a buffer of this ``dtype``; ``as_it_came``: of each element, where that is "auto"."""
    if dtype == "int8":
        return quantized_nbytes(numel)
    return numel * (as_it_came if dtype == "auto" else DTYPES[dtype].itemsize)


def _moved(tensors: Sequence[Tensor], place: torch.device) -> list[Tensor]:
    return [tensor.to(place, non_blocking=True) for tensor in tensors]
