"""A run that cannot fit is refused before anything is loaded, unless it is told to try."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_unet

from fastunlearn.config import Config
from fastunlearn.errors import UserError
from fastunlearn.models.description import ModelDescription
from fastunlearn.planning.plan import make_plan
from fastunlearn.training import memory_check as guard

UNET = json.dumps(dict(tiny_unet().config) | {"_class_name": "UNet2DConditionModel"})
MODEL = ModelDescription(UNET, 5, 8, 10_000)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the machine is said to have free."""
    memory = {"bytes": 0}
    monkeypatch.setattr(guard, "describe_model", lambda _: MODEL)
    monkeypatch.setattr(guard, "available_host_bytes", lambda: memory["bytes"])
    monkeypatch.setattr(guard.torch.cuda, "is_available", lambda: False)
    return memory


def config(**train: Any) -> Config:
    model = {"pretrained_model_name_or_path": "somewhere"}
    return Config.model_validate({"concepts": ["neon style"], "keep": ["cat"], "model": model, "train": train})


@pytest.mark.parametrize("world", [1, 2])
def test_what_certainly_does_not_fit_is_refused_and_what_may_fit_is_not(free: dict[str, int], world: int) -> None:
    plan = make_plan(config(), world, MODEL)
    needed = world * max(device + host for device, host in plan.phases.values())
    assert needed > world * MODEL.loading
    free["bytes"] = int(needed * 0.91)  # within the plan's own error
    guard.check_memory(config(), world)
    free["bytes"] = int(needed * 0.89)
    with pytest.raises(UserError, match=r"^memory: the run needs about .* this machine has"):
        guard.check_memory(config(), world)


def test_it_can_be_told_to_try(free: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    free["bytes"] = 1000
    guard.check_memory(config(memory_check="warn"), 1)
    assert "memory: the run needs" in capsys.readouterr().out
    guard.check_memory(config(memory_check="off"), 1)
    assert capsys.readouterr().out == ""


def test_loading_counts_too(free: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "describe_model", lambda _: ModelDescription(UNET, 5, 8, 10**12))
    free["bytes"] = 10**11
    with pytest.raises(UserError, match="931"):
        guard.check_memory(config(), 1)


def test_a_system_that_does_not_say_is_not_asked(tmp_path: Path) -> None:
    table = tmp_path / "meminfo"
    table.write_text("MemTotal:  100 kB\nMemAvailable:    7 kB\n")
    assert guard.available_host_bytes(table) == 7 * 1024
    table.write_text("MemTotal:  100 kB\n")
    assert guard.available_host_bytes(table) is None
    assert guard.available_host_bytes(tmp_path / "none") is None
