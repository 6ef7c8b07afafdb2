"""Channels-last activations and compiled blocks change the time of a run, and nothing that it computes.

"aot_eager" takes the whole way of a compiled block (tracing, guards, its own backward) except for the code that is
generated in the end; one test generates it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from launched import WORKERS, run_ranks
from safetensors.torch import load_file
from speed_worker import BACKEND, LEVERS, ZERO, pull
from tiny import flat, tiny_unet
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastunlearn.acceleration.attention import install_attention, stop_first_token_gradient
from fastunlearn.acceleration.compilation import apply_channels_last, compile_blocks
from fastunlearn.config import Config
from fastunlearn.denoisers.teacher import Teacher
from fastunlearn.errors import UserError
from fastunlearn.models.parameter_names import set_trainable, trainable_names

WORKER = WORKERS / "speed_worker.py"
# So that three updates move each scope visibly.
RATES = {"attn2": 10.0, "noxattn": 0.3, "full": 0.3}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.config.recompile_limit = limit


def arguments(batch: int = 2) -> tuple[tuple[Tensor, Tensor], dict]:
    draw = torch.Generator().manual_seed(5)
    added = {"text_embeds": torch.randn(batch, 8, generator=draw), "time_ids": torch.ones(batch, 6)}
    hidden = torch.randn(batch, 5, 16, generator=draw)
    kwargs = {"encoder_hidden_states": hidden, "added_cond_kwargs": added, "return_dict": False}
    return (torch.randn(batch, 4, 8, 8, generator=draw), torch.linspace(3, 700, batch)), kwargs


def trained(levers: str, scope: str, choice: str, checkpointing: bool, autocast: bool) -> dict[str, list[Tensor]]:
    """Three updates of the student towards twice the teacher: what teacher, sampler and student gave, all gradients."""
    unet = tiny_unet().train()
    names = trainable_names(unet, scope)
    set_trainable(unet, names)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    install_attention(unet, choice)
    pull(unet, levers)
    stop_first_token_gradient(unet)
    teacher = Teacher(unet, names, whole_copy=False)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=RATES[scope])
    seen: dict[str, list[Tensor]] = {"teacher": [], "sampler": [], "student": [], "gradient": []}
    args, kwargs = arguments()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            target = teacher(*args, **kwargs)[0].float()
            with torch.no_grad():
                seen["sampler"].append(unet(*args, **kwargs)[0].float())
            prediction = unet(*args, **kwargs)[0].float()
        (prediction - 2 * target).square().mean().backward()
        assert all(p.grad is not None and p.grad.stride() == p.stride() for p in parameters)
        seen["teacher"].append(target)
        seen["student"].append(prediction.detach())
        seen["gradient"].append(flat({name: p.grad for name, p in unet.named_parameters() if p.grad is not None}))
        optimizer.step()
        optimizer.zero_grad()
    return seen


CASES = [
    ("compiled", "attn2", "auto", False, False),
    ("compiled", "noxattn", "sdpa-flash", True, False),
    ("compiled", "full", "sdpa-math", True, True),
    ("channels_last", "attn2", "auto", False, False),
    ("channels_last", "full", "auto", True, False),
    ("both", "full", "auto", True, False),
]


@pytest.mark.parametrize(("levers", "scope", "choice", "checkpointing", "autocast"), CASES)
def test_updates_equal_the_plain_ones(
    levers: str, scope: str, choice: str, checkpointing: bool, autocast: bool
) -> None:
    """The teacher puts other tensors in the place of weights, and the weights move: neither may meet an old program."""
    expected = trained("plain", scope, choice, checkpointing, autocast)
    counters.clear()
    got = trained(levers, scope, choice, checkpointing, autocast)
    moved = (expected["student"][-1] - expected["student"][0]).norm() / expected["student"][0].norm()
    assert moved > 0.01, "a student that stands still would not show a stale weight"
    exact = trained("plain", scope, choice, checkpointing, False) if autocast else expected
    for name, tensors in expected.items():
        for ours, plain, fp32 in zip(got[name], tensors, exact[name], strict=True):
            # In bf16: no further from fp32 than twice what the plain one is.
            bound = 2 * (plain - fp32).norm() if autocast else 1e-4 * plain.norm()
            assert (ours - fp32).norm() <= bound, name
    assert all(torch.equal(target, got["teacher"][0]) for target in got["teacher"])
    assert (counters["stats"]["unique_graphs"] > 0) == (levers != "channels_last")
    assert not counters["graph_break"]


def test_generated_code_of_one_block() -> None:
    """A block as it is compiled in a run, against a deep copy of it, which is not compiled."""
    unet = tiny_unet()
    install_attention(unet, "sdpa-flash")
    compile_blocks(unet)
    block = next(module for module in unet.modules() if isinstance(module, BasicTransformerBlock))
    plain = copy.deepcopy(block)
    assert block._compiled_call_impl is not None and plain._compiled_call_impl is None
    tokens, context = torch.randn(2, 16, 16), torch.randn(2, 5, 16)
    results = []
    for module in (block, plain):
        given = tokens.clone().requires_grad_()
        out = module(given, encoder_hidden_states=context)
        out.square().sum().backward()
        results.append([out.detach(), given.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_equal_blocks_share_one_program() -> None:
    unet = tiny_unet()
    blocks = compile_blocks(unet, BACKEND)
    shapes = {tuple(p.shape for p in m.parameters()) for m in unet.modules() if isinstance(m, BasicTransformerBlock)}
    args, kwargs = arguments()
    with torch.no_grad():
        unet(*args, **kwargs)
    # Blocks on the coarse and on the fine level differ in the number of tokens.
    assert len(shapes) <= counters["stats"]["unique_graphs"] < blocks


def test_a_run_has_more_variants_than_pytorch_allows() -> None:
    unet = tiny_unet()
    compile_blocks(unet, "eager")
    with torch.no_grad():
        for batch in range(1, 10):
            args, kwargs = arguments(batch)
            unet(*args, **kwargs)
    assert counters["stats"]["unique_graphs"] >= 9


def test_names_and_parameters_stay() -> None:
    unet = tiny_unet()
    names = [name for name, _ in unet.named_parameters()]
    identities = {id(p) for p in unet.parameters()}
    pull(unet, "both")
    assert [name for name, _ in unet.named_parameters()] == names
    assert {id(p) for p in unet.parameters()} == identities


@pytest.mark.parametrize("scope", ["attn2", "full"])
def test_every_convolution_works_on_channels_last(scope: str) -> None:
    unet: UNet2DConditionModel = tiny_unet()
    set_trainable(unet, trainable_names(unet, scope))
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    convolutions = [module for module in unet.modules() if isinstance(module, nn.Conv2d)]
    assert apply_channels_last(unet) == len(convolutions)
    seen = []
    for module in convolutions:
        module.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    args, kwargs = arguments()
    unet(*args, **kwargs)
    assert len(seen) >= len(convolutions)
    for given, out in seen:
        assert given.is_contiguous(memory_format=torch.channels_last)
        assert out.is_contiguous(memory_format=torch.channels_last)
    for module in convolutions:
        weight = module.weight
        assert weight.is_contiguous() if scope == "full" else weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"model": {"compile": "regional"}, "zero": {"stage": 3}}, "model.compile"),
        ({"model": {"compile": "regional"}, "teacher": {"storage": "int8"}}, "model.compile"),
        ({"model": {"channels_last": True}, "zero": {"stage": 3}}, "model.channels_last"),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict, field: str) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(field)}: "):
        Config.model_validate({"concepts": ["neon style"], **sections})
    Config.model_validate({"concepts": ["neon style"], "model": sections["model"], "zero": {"stage": 2}})


@pytest.mark.slow
def test_zero_on_two_ranks_gives_the_same_weights(tmp_path: Path) -> None:
    """Whole updates by the trainer's own functions, at stages 1 and 2. Adam's first steps hang on a gradient's sign."""
    run_ranks(WORKER, tmp_path, world=2)
    start = tiny_unet().state_dict()
    for stage, scope in ZERO:
        plain = load_file(tmp_path / f"{stage}-{scope}-plain.safetensors")
        expected = flat(plain)
        moved = (expected - flat({name: start[name] for name in plain})).norm()
        assert moved > 0
        for levers in LEVERS[1:]:
            got = flat(load_file(tmp_path / f"{stage}-{scope}-{levers}.safetensors"))
            assert (got - expected).norm() <= 1e-3 * moved, (stage, scope, levers)
