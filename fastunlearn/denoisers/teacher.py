"""Predictions of the frozen model, without a second U-Net.

A copy of the tensors that training changes is put in place for the duration of a call: as they were, or in 8 bits,
brought back one layer at a time. ZeRO-3 shards the student's parameters, so there, and only there, the teacher is a
whole second module. ``teacher_check.py`` judges whether 8 bits are good enough; a moving teacher is in ``ema.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastunlearn.config import Config
from fastunlearn.models.parameter_names import is_small
from fastunlearn.utils.memory_rows import FP32, Row, Sizes, quantized_nbytes
from fastunlearn_kernels import Quantized, blockwise_dequantize, blockwise_quantize

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


class Teacher:
    """The frozen original of a U-Net, callable like the U-Net itself. Never records a gradient.

    Build it before the first update, and before DeepSpeed touches the module.
    """

    def __init__(self, unet: nn.Module, trained: Sequence[str], *, whole_copy: bool, storage: str = "exact") -> None:
        """``storage``: "exact", "int8" or "fp8", of the tensors that the student trains."""
        self._module = copy.deepcopy(unet).requires_grad_(False) if whole_copy else unet
        self._swap = not whole_copy
        parameters = dict(unet.named_parameters())
        self._swaps = [] if storage == "exact" else install_swaps(unet, trained, storage)
        swapped = trained if self._swap and not self._swaps else []
        self.frozen = {name: parameters[name].detach().clone() for name in swapped}

    @torch.no_grad()
    def __call__(self, *args: Tensor, **kwargs: object) -> tuple[Tensor, ...]:
        """Run the original weights on the arguments of the U-Net's ``forward``."""
        if self._swaps:
            return self._borrowing(*args, **kwargs)
        if not self._swap:
            return self._module(*args, **kwargs)
        return torch.func.functional_call(self._module, self.frozen, args, kwargs)

    def _borrowing(self, *args: Tensor, **kwargs: object) -> tuple[Tensor, ...]:
        for loan in self._swaps:
            loan.active = True
        try:
            return self._module(*args, **kwargs)
        finally:
            for loan in self._swaps:
                loan.active = False


class QuantizedTensor:
    """One tensor in 8 bits. int8: 256 elements share a scale; fp8: each row of the first dimension has one."""

    def __init__(self, tensor: Tensor, storage: str) -> None:
        self._dtype = tensor.dtype
        self.exact: Tensor | None = None
        self.quantized: Quantized | None = None
        if is_small(tensor.numel()) or tensor.dim() < 2:  # norms and biases: nothing to gain, much to lose
            self.exact = tensor.detach().clone()
        elif storage == "int8":
            self.quantized = blockwise_quantize([tensor.detach()])
        else:
            rows = tensor.detach().float().flatten(1)
            scale = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / FP8_MAX
            self.scale = scale.view(-1, *[1] * (tensor.dim() - 1))
            self.codes = (tensor.detach().float() / self.scale).to(FP8)

    def load(self) -> Tensor:
        """The tensor, nearly, in its own dtype."""
        if self.exact is not None:
            return self.exact
        if self.quantized is not None:
            return blockwise_dequantize(self.quantized, self._dtype)[0]
        return (self.codes.float() * self.scale).to(self._dtype)


class WeightSwap:
    """While active, a module computes with its stored parameters instead of its own."""

    def __init__(self, module: nn.Module, stored: dict[str, QuantizedTensor]) -> None:
        self.active = False
        self._stored = stored
        self._own: dict[str, nn.Parameter | None] = {}
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after, always_call=True)

    def _before(self, module: nn.Module, _: object) -> None:
        if self.active:
            self._own = {name: module._parameters[name] for name in self._stored}
            for name, stored in self._stored.items():
                module._parameters[name] = stored.load()  # type: ignore[assignment]  # a plain tensor, as in functional_call

    def _after(self, module: nn.Module, *_: object) -> None:
        module._parameters.update(self._own)
        self._own = {}


def install_swaps(unet: nn.Module, names: Sequence[str], storage: str) -> list[WeightSwap]:
    """Store these parameters of ``unet`` in 8 bits, beside the modules that own them."""
    owned: dict[str, dict[str, QuantizedTensor]] = {}
    for name in names:
        owner, _, own_name = name.rpartition(".")
        owned.setdefault(owner, {})[own_name] = QuantizedTensor(unet.get_parameter(name), storage)
    return [WeightSwap(unet.get_submodule(owner), stored) for owner, stored in owned.items()]


def teacher_rows(cfg: Config, sizes: Sizes, compute: int) -> list[Row]:
    """The originals of what is trained: as they were, or in 8 bits; then a layer of them is brought back at a time."""
    storage = cfg.teacher.storage
    if not cfg.needs_teacher:
        return []
    if storage == "exact":
        return [Row("teacher: originals of what is trained", sum(sizes.trained) * compute)]
    small = sum(n for bits, numels in sizes.groups for n in numels if bits == 32)
    matrices = [n for bits, numels in sizes.groups for n in numels if bits == 8]
    # fp8 has a scale for each row, which is next to nothing.
    stored = small * compute + (sum(map(quantized_nbytes, matrices)) if storage == "int8" else sum(matrices))
    largest = max(matrices, default=0) * (compute if storage == "int8" else FP32 + compute)
    return [
        Row(f"teacher: originals of what is trained ({storage})", stored),
        Row("teacher: the tensor that is brought back", largest, phases=("backward",)),
    ]
