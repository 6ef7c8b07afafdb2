"""The sampler's calls of the student as CUDA graphs: one replay instead of thousands of launches.

A callable like the U-Net, for calls without a gradient. Each shape is captured at its first call and replayed from then
on. A graph remembers addresses: inputs are copied to where they were, weights are read where they are, so that it sees
what the optimizer has made of them in place. Hooks and anything else in Python run at the first call only.

It cannot serve the teacher, whose weights are other tensors, or ZeRO-3, which moves weights about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

WARMUP_CALLS = 2  # libraries choose their algorithms and allocate in the first calls, which must not be captured

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]
"""Runs a function so that it can be run again: (replay, the tensor that each replay writes)."""


def capture_on_gpu(function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """Capture the launches of ``function`` on the current device."""
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
    """One shape's graph."""

    inputs: list[Tensor]
    output: Tensor
    replay: Callable[[], Any]


class GraphedSampler:
    """A U-Net for calls without a gradient, captured once for each shape of its inputs."""

    def __init__(self, unet: nn.Module, capture: Capture = capture_on_gpu) -> None:
        self._unet, self._capture = unet, capture
        self.graphs: dict[tuple, Graph] = {}

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """As the U-Net's forward pass with ``return_dict=False``; the result is the caller's own."""
        leaves, structure = tree_flatten((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in given)
        graph = self.graphs.get(key)
        if graph is None:
            graph = self.graphs[key] = self._captured(leaves, structure)
        for place, tensor in zip(graph.inputs, given, strict=True):
            place.copy_(tensor)
        graph.replay()
        return (graph.output.clone(),)

    def _captured(self, leaves: list[Any], structure: TreeSpec) -> Graph:
        own = [leaf.clone().contiguous() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(own, structure)
        replay, output = self._capture(lambda: self._unet(*args, **kwargs)[0])
        return Graph([leaf for leaf in own if isinstance(leaf, Tensor)], output, replay)
