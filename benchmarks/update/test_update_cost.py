"""What one update costs on MiniCanvas, through the trainer itself: KSCU and ESD, and the restart of a trajectory.

Not a measure of quality, and not of DeepSpeed's start-up or of loading: the run is prepared outside the timing. Updates
are taken from the method's own table in order, so that the mix of key steps is the real one. Run with `make bench`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastunlearn.utils.environment import prepare_environment

prepare_environment(cpu_threads=1)

from fastunlearn.config import load_config  # noqa: E402  (torch must not be imported before the environment is set)
from fastunlearn.sampling.key_steps import KeyStep  # noqa: E402
from fastunlearn.training.setup import Run, prepare  # noqa: E402
from fastunlearn.training.trainer import one_update  # noqa: E402
from fastunlearn.utils.distributed import World, disconnect, init_distributed  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
WARMUP_UPDATES = 3
UPDATES = 40
RESTARTS = 5
CASES = {"kscu-style": ("style", "kscu"), "kscu-object": ("object", "kscu"), "esd-style": ("style", "esd")}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_distributed()
    disconnect()


def prepared(case: str, world: World, folder: Path) -> Run:
    kind, method = CASES[case]
    config = ROOT / "configs" / f"minicanvas_{kind}.toml"
    return prepare(load_config(str(config), ["--method", method, "--output_dir", str(folder)]), world)


@pytest.mark.parametrize("case", CASES)
def test_one_update(benchmark: BenchmarkFixture, case: str, world: World, tmp_path: Path) -> None:
    run = prepared(case, world, tmp_path)
    steps = iter(run.table)

    def next_step() -> tuple[tuple[Run, KeyStep], dict]:
        step = next(steps)
        if step.restart:
            run.rollout.restart(step)
        return (run, step), {}

    benchmark.pedantic(one_update, setup=next_step, rounds=UPDATES, warmup_rounds=WARMUP_UPDATES)
    benchmark.extra_info["device"] = str(world.device)
    benchmark.extra_info["trained_parameters"] = sum(p.numel() for p in run.engine.named.values())


def test_restart_of_a_trajectory(benchmark: BenchmarkFixture, world: World, tmp_path: Path) -> None:
    """From noise to the first key step, with guidance and without a gradient; shared by the updates of a traversal."""
    run = prepared("kscu-style", world, tmp_path)
    benchmark.pedantic(run.rollout.restart, args=(run.table[0],), rounds=RESTARTS, warmup_rounds=1)
    benchmark.extra_info["sampler_steps"] = run.table[0].index
