"""The graphed sampler: what it copies, when it records, and, where there is a GPU, the graph itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import POOLED_WIDTH, TEXT_WIDTH, TOKENS, tiny_unet
from torch import Tensor

from fastunlearn.acceleration.cuda_graphs import GraphedSampler, capture_on_gpu
from fastunlearn.config import load_config
from fastunlearn.errors import UserError


def inputs(rows: int, seed: int, device: str = "cpu") -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    added = {"text_embeds": torch.randn(rows, POOLED_WIDTH, generator=draw), "time_ids": torch.ones(rows, 6)}
    sample, text = torch.randn(rows, 4, 8, 8, generator=draw), torch.randn(rows, TOKENS, TEXT_WIDTH, generator=draw)
    times = torch.randint(0, 1000, (rows,), generator=draw)
    kwargs = {
        "encoder_hidden_states": text.to(device), "return_dict": False,
        "added_cond_kwargs": {name: tensor.to(device) for name, tensor in added.items()},
    }  # fmt: skip
    return (sample.to(device), times.to(device)), kwargs


class Tape:
    """Records as a graph does: a replay computes from the tensors of the first call into the tensor of the first."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        self.recorded += 1
        output = torch.full_like(function(), float("nan"))
        return lambda: output.copy_(function()), output


def test_every_shape_is_recorded_once_and_replays_see_new_inputs_and_new_weights() -> None:
    unet, tape = tiny_unet(), Tape()
    sampler = GraphedSampler(unet, tape)
    kept = []
    for number, rows in enumerate((2, 2, 3, 2)):
        args, kwargs = inputs(rows, number)
        with torch.no_grad():
            unet.conv_out.bias.add_(0.1)  # as an optimizer's step does, in place
            (expected,) = unet(*args, **kwargs)
        (got,) = sampler(*args, **kwargs)
        assert torch.equal(got, expected) and not got.requires_grad
        kept.append((got, expected.clone()))
    assert tape.recorded == len(sampler.graphs) == 2
    assert all(torch.equal(got, expected) for got, expected in kept)  # nobody writes into a result that was given away


def test_a_model_without_added_conditions_is_called_without() -> None:
    class Plain(torch.nn.Module):
        def forward(self, sample: Tensor, times: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> tuple:
            return (sample * times.view(-1, 1, 1, 1) + encoder_hidden_states.sum(),)

    (sample, times), kwargs = inputs(2, 0)
    del kwargs["added_cond_kwargs"]
    (got,) = GraphedSampler(Plain(), Tape())(sample, times, **kwargs)
    assert torch.equal(got, Plain()(sample, times, **kwargs)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records on a GPU")
def test_a_recorded_graph_gives_what_the_model_gives() -> None:
    unet = tiny_unet().cuda()
    sampler = GraphedSampler(unet, capture_on_gpu)
    for number in range(3):
        args, kwargs = inputs(2, number, "cuda")
        with torch.no_grad():
            unet.conv_out.bias.add_(0.1)
            (expected,) = unet(*args, **kwargs)
        torch.testing.assert_close(sampler(*args, **kwargs)[0], expected)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--zero_stage", "3"], r"zero\.stage 3"),
        (["--method", "sdd"], "'sdd'"),
        (["--mixed_precision", "bf16", "--zero_stage", "0"], "autocast"),
    ],
)
def test_where_a_graph_would_be_wrong_it_is_refused(options: list[str], field: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.cuda_graphs: .*{field}"):
        load_config(None, ["--concepts", "cat", "--model.cuda_graphs", "true", *options])


def test_without_a_gpu_it_is_refused_before_anything_is_loaded() -> None:
    cfg = load_config(None, ["--concepts", "cat", "--model.cuda_graphs", "true"])
    with pytest.raises(UserError, match=r"^model\.cuda_graphs"):
        cfg.validate_runtime(1, cpu_count=2, has_gpu=False)
    cfg.validate_runtime(1, cpu_count=2, has_gpu=True)
