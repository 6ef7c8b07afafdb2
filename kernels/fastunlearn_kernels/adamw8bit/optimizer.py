"""AdamW with 8-bit moments as a torch optimizer, on `adamw8bit_step`; its state is that of bitsandbytes' AdamW8bit.

State of a parameter: step, state1, state2 (m, v); from `min_8bit_size` elements on as uint8 with absmax1, absmax2 and
the maps qmap1, qmap2, below that as fp32. `state_dict()` keeps the tensors of a parameter under one key, as
bitsandbytes has done since 0.50; `load_state_dict` takes that form and the flat one before it. So a state dict of one
optimizer loads in the other, and the next updates agree within the step of the number format. Written from that
layout; bitsandbytes is not needed. Without paged memory and amsgrad; ZeRO hands in flat partitions as parameters.

Usage: `optimizer = AdamW8bit(model.parameters(), lr=1e-5)`; `optimizer.step(retain=..., plan=..., segments=...)`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastunlearn_kernels.adamw8bit.step import adamw8bit_step
from fastunlearn_kernels.common.tiles import QUANT_BLOCK
from fastunlearn_kernels.gradients.operands import Retain
from fastunlearn_kernels.gradients.segments import Segments, whole
from fastunlearn_kernels.gradients.surgery_coefficients import SurgeryPlan
from fastunlearn_kernels.quantize.blockwise_quantize import Quantized
from fastunlearn_kernels.quantize.dynamic_code import dynamic_map

WRAPPED = "__bnb_optimizer_quant_state__"
QUANT_KEYS = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")


class AdamW8bit(torch.optim.Optimizer):
    """
    Args:
        params: as for torch's optimizers. A group with "bits": 32 keeps fp32 moments whatever its size.
        min_8bit_size: parameters with fewer elements keep fp32 moments. stochastic_rounding: of bf16 parameters;
        None: yes. Parameters of other dtypes are rounded to nearest. seed: where the random bits start; each step
        takes others. copies: a tensor of another dtype, or None, for each parameter in order (of all groups):
        receives the new values.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = 4096,
        stochastic_rounding: bool | None = None,
        seed: int = 0,
        copies: Sequence[Tensor | None] | None = None,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"out of range: lr {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bits": 8})
        self.min_8bit_size, self.stochastic_rounding, self.seed = min_8bit_size, stochastic_rounding, seed
        everything = [p for group in self.param_groups for p in group["params"]]
        if copies is not None and len(copies) != len(everything):
            raise ValueError(f"{len(copies)} copies for {len(everything)} parameters")
        self.copy_of = dict(zip(everything, copies or [None] * len(everything)))

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        retain: Retain = None,
        plan: SurgeryPlan | None = None,
        segments: Segments | None = None,
    ) -> Any:
        """One update of the parameters that have a gradient; one launch for each kind of them in a group.

        `retain`, `plan` and `segments` are those of the surgery ops for the list of exactly these parameters, over all
        groups in order. A plan with found_inf = 1 leaves parameters and moments alone; steps are counted even so.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if plan is not None and segments is None:
            segments = whole([p for _, p in moving])
        for call, places in enumerate(self._calls(moving).values()):
            group, first = moving[places[0]]
            params = [moving[i][1] for i in places]
            states = [self.state[p] for p in params]
            count, copies = states[0]["step"], [self.copy_of.get(p) for p in params]
            keys = ("state1", "state2", "absmax1", "absmax2")
            adamw8bit_step(
                params, [p.grad for p in params if p.grad is not None],
                *[[state[key] for state in states if key in state] for key in keys],
                step=count, lr=float(group["lr"]), betas=group["betas"][:2], eps=group["eps"],
                weight_decay=group["weight_decay"], copies=[copy for copy in copies if copy is not None],
                retain=_part(retain, places), plan=plan, segments=_part_of_segments(segments, places),
                stochastic_rounding=first.dtype == torch.bfloat16 and self.stochastic_rounding is not False,
                seed=self.seed + 1_000_003 * count + 7919 * call,
            )  # fmt: skip
        return loss

    def _calls(self, moving: Sequence[tuple[dict[str, Any], Tensor]]) -> dict[tuple, list[int]]:
        """Places in `moving` by what one call of the op can have in common. Counts the step and makes missing state."""
        calls: dict[tuple, list[int]] = {}
        for i, (group, p) in enumerate(moving):
            assert p.grad is not None
            if p.grad.is_sparse:
                raise ValueError("sparse gradients are not supported")
            if not self.state[p]:
                self.state[p] = self._new_state(p, group)
            state, copy = self.state[p], self.copy_of.get(p)
            state["step"] = int(state["step"]) + 1
            kind = state["state1"].dtype, p.dtype, p.grad.dtype, copy.dtype if copy is not None else None, p.device
            calls.setdefault((id(group), state["step"], *kind), []).append(i)
        return calls

    def _new_state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        in_8_bits = group.get("bits", 8) == 8 and p.numel() >= self.min_8bit_size
        dtype = torch.uint8 if in_8_bits else torch.float32
        state: dict[str, Any] = {"step": 0}
        for suffix, signed in (("1", True), ("2", False)):
            state["state" + suffix] = torch.zeros(p.shape, dtype=dtype, device=p.device)
            if in_8_bits:
                state["qmap" + suffix] = dynamic_map(signed, p.device)
                blocks = -(-p.numel() // QUANT_BLOCK)
                state["absmax" + suffix] = torch.zeros(blocks, dtype=torch.float32, device=p.device)
        return state

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the tensors of each parameter under one key, so that FSDP does not take them for shards."""
        out = super().state_dict()
        out["state"] = {
            name: {key: value for key, value in state.items() if key not in QUANT_KEYS}
            | {WRAPPED: {key: state[key] for key in QUANT_KEYS if key in state}}
            for name, state in out["state"].items()
        }
        return out

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state dict of this optimizer or of bitsandbytes' AdamW8bit; tensors are copied.

        Raises ValueError if groups or sizes do not match the parameters, or if the numbers are coded with another map.
        """
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        states = {}
        for name, p in zip(saved, own):
            if name in state_dict["state"]:
                given = dict(state_dict["state"][name])
                states[p] = _checked(given | given.pop(WRAPPED, {}), p)
        # torch's own would cast uint8 and absmax to the dtype of the parameter; it gets the groups only.
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state.update(states)


def _checked(given: Mapping[str, Any], p: Tensor) -> dict[str, Any]:
    """The state of one parameter, copied to its device. Unknown entries are kept out."""
    in_8_bits = given["state1"].dtype == torch.uint8
    state: dict[str, Any] = {"step": int(given["step"])}
    for suffix, signed in (("1", True), ("2", False)):
        moment = given["state" + suffix]
        if moment.numel() != p.numel():
            raise ValueError(f"state{suffix} has {moment.numel()} elements for a parameter of {p.numel()}")
        # bitsandbytes numbers elements as they lie in memory, and makes parameters contiguous when it steps.
        dtype = torch.uint8 if in_8_bits else torch.float32
        state["state" + suffix] = moment.to(p.device, dtype, copy=True).reshape(p.shape).contiguous()
        if in_8_bits:
            state["qmap" + suffix] = dynamic_map(signed, p.device)
            if not torch.equal(given["qmap" + suffix].cpu().float(), dynamic_map(signed)):
                raise ValueError(f"qmap{suffix} is not the dynamic map: these moments are coded in another format")
            absmax = given["absmax" + suffix]
            if absmax.shape != (-(-p.numel() // QUANT_BLOCK),):
                raise ValueError(f"absmax{suffix} has shape {tuple(absmax.shape)}: not one scale for 256 elements")
            state["absmax" + suffix] = absmax.to(p.device, torch.float32, copy=True)
    return state


def _part(retain: Retain, places: Sequence[int]) -> Retain:
    if isinstance(retain, Quantized):
        return Quantized([retain.codes[i] for i in places], [retain.absmax[i] for i in places])
    return None if retain is None else [retain[i] for i in places]


def _part_of_segments(segments: Segments | None, places: Sequence[int]) -> Segments | None:
    """The pieces of some tensors of a list; segments keep their numbers, and so their coefficients."""
    if segments is None:
        return None
    new = {place: i for i, place in enumerate(places)}
    pieces = tuple((new[t], begin, end, s) for t, begin, end, s in segments.pieces if t in new)
    return Segments(pieces, segments.count)
