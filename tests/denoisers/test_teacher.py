"""A teacher in 8 bits: what it predicts, what it holds, and when it is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import tiny_backbone, tiny_prompts, tiny_unet
from torch import nn

from fastunlearn.config import Config, TeacherConfig
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.denoisers.teacher import QuantizedTensor, Teacher
from fastunlearn.denoisers.teacher_check import TargetError, check_teacher, target_errors
from fastunlearn.errors import UserError
from fastunlearn.models import parameter_names
from fastunlearn.models.parameter_names import trainable_names


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter_names, "SMALL_TENSOR_NUMEL", 100)


def inputs() -> tuple[tuple, dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    prompt_table = tiny_prompts()
    backbone = tiny_backbone(prompt_table)
    embeds = backbone.embeds.select([0, 1])
    assert embeds.pooled is not None and backbone.fixed_inputs["time_ids"] is not None
    conditions = {"text_embeds": embeds.pooled, "time_ids": backbone.fixed_inputs["time_ids"].expand(2, -1)}
    arguments = (torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([300, 700]))
    return arguments, {
        "encoder_hidden_states": embeds.hidden, "return_dict": False, "added_cond_kwargs": conditions,
    }  # fmt: skip


@pytest.mark.parametrize("scope", ["attn2", "full"])
@pytest.mark.parametrize(("storage", "bound"), [("int8", 0.02), ("fp8", 0.1)])
def test_it_predicts_nearly_what_the_exact_one_does_whatever_the_student_learns(
    storage: str, bound: float, scope: str
) -> None:
    unet, (args, kwargs) = tiny_unet(), inputs()
    with torch.no_grad():
        (exact,) = unet(*args, **kwargs)
    names = trainable_names(unet, scope)
    teacher = Teacher(unet, names, whole_copy=False, storage=storage)
    with torch.no_grad():
        for name in names:
            unet.get_parameter(name).add_(0.5)
    (found,) = teacher(*args, **kwargs)
    error = float((found - exact).norm() / exact.norm())
    assert 1e-6 < error < bound  # 8 bits are not exact
    own = dict(unet.named_parameters())
    assert all(isinstance(own[name], nn.Parameter) for name in names)


def test_the_student_is_itself_again_after_a_call_and_after_a_failed_one() -> None:
    unet, (args, kwargs) = tiny_unet(), inputs()
    before = {name: id(p) for name, p in unet.named_parameters()}
    with torch.no_grad():
        (student,) = unet(*args, **kwargs)
    teacher = Teacher(unet, trainable_names(unet, "full"), whole_copy=False, storage="int8")
    teacher(*args, **kwargs)
    with pytest.raises(RuntimeError):
        teacher(args[0][:, :3], *args[1:], **kwargs)
    with torch.no_grad():
        (again,) = unet(*args, **kwargs)
    assert torch.equal(student, again)
    assert {name: id(p) for name, p in unet.named_parameters()} == before


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_a_stored_tensor_takes_a_byte_an_element_and_small_ones_stay_exact(storage: str) -> None:
    draw = torch.Generator().manual_seed(2)
    matrix = torch.randn(64, 256, generator=draw)
    stored = QuantizedTensor(matrix, storage)
    held = [stored.codes, stored.scale] if storage == "fp8" else [*stored.quantized.codes, *stored.quantized.absmax]  # type: ignore[union-attr]
    assert sum(t.untyped_storage().nbytes() for t in held) <= matrix.numel() * 1.02
    largest = (stored.load() - matrix).abs().amax(1)
    # Half a step: 127 of them to a block's largest value; 3 digits after the first, so 1/16 of the value itself.
    assert bool((largest <= matrix.abs().amax(1) * (1 / 16 if storage == "fp8" else 0.5 / 127 * 1.5)).all())
    bias = torch.randn(20, generator=draw)
    assert torch.equal(QuantizedTensor(bias, storage).load(), bias)


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(QuantizedTensor(torch.zeros(16, 32), "fp8").load(), torch.zeros(16, 32))


def models(storage: str) -> Predictors:
    prompt_table = tiny_prompts()
    backbone = tiny_backbone(prompt_table)
    unet = backbone.unet
    teacher = Teacher(unet, trainable_names(unet, "full"), whole_copy=False, storage=storage)
    return Predictors(backbone, unet, unet, teacher)


def test_the_error_that_is_reported_is_that_of_the_predictions() -> None:
    """Against predictions of two separate models, one of which holds the dequantised weights."""
    both = models("int8")
    errors = target_errors(both, tiny_prompts(), seed=5)
    lossy = copy.deepcopy(both.backbone.unet)
    for parameter in lossy.parameters():
        parameter.data = QuantizedTensor(parameter, "int8").load()
    separate = Predictors(both.backbone, both.backbone.unet, both.backbone.unet, Teacher(lossy, [], whole_copy=True))
    expected = target_errors(separate, tiny_prompts(), seed=5)
    assert [e.timestep for e in errors] == [62, 187, 312, 437, 562, 687, 812, 937]
    for found, wanted in zip(errors, expected, strict=True):
        assert found.prediction == pytest.approx(wanted.prediction, rel=1e-3)
        assert found.concept == pytest.approx(wanted.concept, rel=1e-3)
        assert found.prediction > 1e-5


def test_an_exact_teacher_has_no_error() -> None:
    assert all(e.prediction == 0 and e.concept == 0 for e in target_errors(models("exact"), tiny_prompts(), seed=5))


def test_too_large_an_error_is_refused_and_one_that_is_not_a_number_too() -> None:
    errors = [TargetError(100, 0.01, 0.3), TargetError(900, 0.05, 0.1)]
    with pytest.raises(UserError, match=r"^teacher\.storage: 'fp8' .* 5\.00% at timestep 900"):
        check_teacher(TeacherConfig(storage="fp8"), errors)
    with pytest.raises(UserError, match="nan"):
        check_teacher(TeacherConfig(storage="fp8"), [TargetError(900, float("nan"), 0.1)])
    assert "900: 5.00%" in check_teacher(TeacherConfig(storage="fp8", max_error=0.06), errors)


def test_a_sharded_teacher_is_not_stored_in_8_bits() -> None:
    with pytest.raises(UserError, match=r"^teacher\.storage:"):
        Config.model_validate({"concepts": ["neon style"], "zero": {"stage": 3}, "teacher": {"storage": "int8"}})
