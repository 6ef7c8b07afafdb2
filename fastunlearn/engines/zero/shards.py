"""Where this rank's averaged gradients and master weights lie in DeepSpeed's optimizer, at each ZeRO stage.

The protocol of two gradient windows in one update. A window is one or more backward calls, the last of
them at a gradient accumulation boundary; after it each rank holds the mean gradient of its own part of the parameters.
``take`` keeps that part and arms the next window; ``read`` gives the part that ``step`` will use, for editing in place.
``set_masters`` writes this rank's part of given weights into its fp32 masters. Where a part begins and ends is asked of
DeepSpeed; ``partition.py`` has the rule as arithmetic.

    stage 0           every rank holds whole gradients in ``p.grad``
    stage 1, 2        ``averaged_gradients[group]``: one tensor per parameter of the partition, then padding. Taking the
                      list away and leaving None makes DeepSpeed allocate a new one, so that keeping it costs no copy.
    the same, CPU     ``.grad`` of the flat fp32 partition. Unless ``micro_step_id`` is set back, the next window would
                      add the gradient that the last update left on the host.
    stage 3           ``averaged_gradients[sub_group]``: views of one persistent buffer, so they are copied;
                      ``zero_grad`` makes the next window overwrite it instead of adding to it.
    the same, CPU     ``.grad`` of the flat fp32 sub-group, padded per parameter; copied, then ``zero_grad``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.engines.optimizers.base import OptimizerSpec
from fastunlearn.gradients.shard import GradientShard


class GradientShards:
    """This rank's gradients under one DeepSpeed optimizer. ``read`` and ``take`` list the same shards in one order."""

    def __init__(
        self,
        optimizer: Any,
        stage: int,
        offload: bool,
        named: Mapping[str, nn.Parameter],
        optimizer_spec: OptimizerSpec,
    ) -> None:
        self._optimizer = optimizer
        self._stage = stage
        self._offload = offload
        self._named = named
        self._spec = optimizer_spec
        self._name_of = {id(parameter): name for name, parameter in named.items()}

    def read(self) -> list[GradientShard]:
        """The gradient of the window that has just ended; editing the shards edits what ``step`` will use."""
        return list(self._shards())

    def take(self) -> list[GradientShard]:
        """The same, out of DeepSpeed's hands: the next window starts from nothing and leaves these shards alone."""
        optimizer = self._optimizer
        shards = self.read()
        if self._stage == 0:
            for parameter in self._named.values():
                parameter.grad = None
        elif self._stage == 3:
            shards = [GradientShard(shard.name, shard.tensor.clone()) for shard in shards]
            optimizer.zero_grad()
        else:
            if self._offload:
                shards = [GradientShard(shard.name, shard.tensor.clone()) for shard in shards]
                optimizer.micro_step_id = -1
            for group in optimizer.averaged_gradients:  # with offload, only where fp32 gradients are accumulated
                optimizer.averaged_gradients[group] = None  # the dict itself is known elsewhere in DeepSpeed
        return shards

    def second_moments(self) -> list[Tensor] | None:
        """AdamW's second moment in fp32 for each shard of ``read``, in its order; None before the first update."""
        if self._stage == 0:
            states = [self._optimizer.state.get(parameter) for parameter in self._named.values()]
            return None if not all(states) else [self._spec.second_moment(state).reshape(-1) for state in states]
        found: list[Tensor] = []
        for group, flat in enumerate(self._flat_partitions()):
            state = self._optimizer.optimizer.state.get(flat)
            if not state:
                return None
            moment = self._spec.second_moment(state).reshape(-1)
            found += [moment.narrow(0, begin, length) for _, begin, length, _ in self._walk(group)]
        return found

    def set_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Fill this rank's fp32 master weights (stages 1 to 3) from whole tensors."""
        for group, flat in enumerate(self._flat_partitions()):
            for name, begin, length, offset in self._walk(group):
                mine = weights[name].reshape(-1)[offset : offset + length]  # shorter than length where padding follows
                flat.detach()[begin : begin + len(mine)].copy_(mine)

    def _shards(self) -> Iterator[GradientShard]:
        if self._stage == 0:
            for name, parameter in self._named.items():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                yield GradientShard(
                    name, parameter.grad.reshape(-1) if parameter.grad.is_contiguous() else parameter.grad
                )
            return
        for group, flat in enumerate(self._flat_partitions()):
            if self._offload:
                assert flat.grad is not None
                for name, begin, length, _ in self._walk(group):
                    yield GradientShard(name, flat.grad.narrow(0, begin, length))
            else:
                tensors = self._optimizer.averaged_gradients[group]
                for parameter, tensor in zip(self._parameters(group), tensors):  # what is left over is padding
                    yield GradientShard(self._name_of[id(parameter)], tensor.view(-1))

    def _walk(self, group: int) -> Iterator[tuple[str, int, int, int]]:
        """(name, begin, length, offset) of each parameter's part in this rank's flat partition of a group; ``offset``:
        where in the parameter the part begins."""
        begin = 0
        if self._stage == 3:
            for parameter in self._parameters(group):
                length = parameter.partition_numel()  # type: ignore[attr-defined]  # DeepSpeed adds it
                yield self._name_of[id(parameter)], begin, length, torch.distributed.get_rank() * length
                begin += length
            return
        skipped, left = self._optimizer.first_offset[group], self._optimizer.partition_size[group]
        for parameter in self._parameters(group):
            length = min(parameter.numel() - skipped, left)
            yield self._name_of[id(parameter)], begin, length, skipped
            begin, left, skipped = begin + length, left - length, 0

    def _parameters(self, group: int) -> list[nn.Parameter]:
        optimizer = self._optimizer
        return list(optimizer.fp16_groups[group] if self._stage == 3 else optimizer.params_in_partition[group])

    def _flat_partitions(self) -> list[Tensor]:
        optimizer = self._optimizer
        return list(
            optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups
        )
