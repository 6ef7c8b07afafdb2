"""The sampler's calls of the student as CUDA graphs: one replay in the place of thousands of launches.

What this is: a callable like the U-Net, for calls without a gradient. Each shape is recorded at its first call, and
replayed from then on. A graph remembers addresses: inputs are copied to where they were, weights are read where they
are, so that it sees what the optimizer has made of them in place.
What this is not: for calls with a gradient, for the teacher, whose weights are other tensors, or for ZeRO-3, which
moves weights about. Hooks and anything else in Python run at the first call only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WARMUP_CALLS = 2  # libraries choose their algorithms and allocate in the first calls, which must not be recorded

Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]
"""Runs a function so that it can be run again: (replay, the tensor that each replay writes)."""


def record_on_gpu(function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """Record the launches of ``function`` on the current device."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARMUP_CALLS):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph.replay, output


@dataclass
class Graph:
    """One shape's recording."""

    inputs: list[Tensor]
    output: Tensor
    replay: Callable[[], Any]


class GraphedSampler:
    """A U-Net for calls without a gradient, recorded once for each shape of its inputs."""

    def __init__(self, unet: nn.Module, record: Recorder = record_on_gpu) -> None:
        self._unet, self._record = unet, record
        self.graphs: dict[tuple, Graph] = {}

    @torch.no_grad()
    def __call__(self, sample: Tensor, times: Tensor, **kwargs: Any) -> tuple[Tensor]:
        """As ``UNet2DConditionModel.forward`` with ``return_dict=False``; the result is the caller's own."""
        added = kwargs.get("added_cond_kwargs") or {}
        given = [sample, times, kwargs["encoder_hidden_states"], *added.values()]
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in given)
        graph = self.graphs.get(key)
        if graph is None:
            graph = self.graphs[key] = self._recorded(given, list(added))
        for place, tensor in zip(graph.inputs, given, strict=True):
            place.copy_(tensor)
        graph.replay()
        return (graph.output.clone(),)

    def _recorded(self, given: list[Tensor], names: list[str]) -> Graph:
        inputs = [tensor.clone().contiguous() for tensor in given]
        sample, times, hidden, *added = inputs
        options = {"added_cond_kwargs": dict(zip(names, added, strict=True))} if names else {}

        def call() -> Tensor:
            return self._unet(sample, times, encoder_hidden_states=hidden, return_dict=False, **options)[0]

        replay, output = self._record(call)
        return Graph(inputs, output, replay)
