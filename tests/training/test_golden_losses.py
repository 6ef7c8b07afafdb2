"""The loss curve of the shipped recipes on MiniCanvas, against one that was recorded before the losses and the sampler
steps went through the registered ops: whoever changes the arithmetic of a training step sees it here.

Record anew, after a change that is meant to alter it:
`PYTHONPATH=tests/support python tests/training/test_golden_losses.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from fastunlearn.config import load_config
from fastunlearn.training.setup import prepare
from fastunlearn.training.trainer import one_update
from fastunlearn.utils.distributed import World, disconnect, init_distributed

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "minicanvas_losses.json"
# Another processor sums convolutions in another order: about 1e-7 a step, and an update amplifies what came before.
TOLERANCE = 1e-3
CASES: dict[str, tuple[str, int, list[str]]] = {
    "kscu-style": ("style", 24, []),
    "kscu-object-uncond": ("object", 12, ["--kscu.uncond_gradient", "true", "--kscu.uncond_weight", "0.1"]),
    "esd-style": ("style", 4, ["--method", "esd"]),
}


AS_RECORDED = ("--progress.enabled", "false")
# The interpreter takes minutes for what the reference does in seconds: there, the first updates of each case.
INTERPRETED_SHARE = 4


def losses_of(case: str, world: World, folder: Path) -> list[float]:
    kind, updates, options = CASES[case]
    if os.environ.get("FASTUNLEARN_KERNELS") == "triton":
        updates = max(1, updates // INTERPRETED_SHARE)
    config = ROOT / "configs" / f"minicanvas_{kind}.toml"
    run = prepare(load_config(str(config), ["--output_dir", str(folder), *AS_RECORDED, *options]), world)
    losses = []
    for step in run.table[:updates]:
        if step.restart:
            run.rollout.restart(step)
        losses += [float(loss) for loss in one_update(run, step).losses]
    return losses


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_the_loss_curves_are_the_recorded_ones(kernels: str, tmp_path: Path) -> None:
    """With the reference, and, for the first updates, with every loss and sampler step through its Triton kernel
    (interpreted on a CPU)."""
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))["losses"]
    here = tmp_path / "losses.json"
    # A process of its own: DeepSpeed is connected once in a process.
    environment = os.environ | {"FASTUNLEARN_KERNELS": kernels}
    done = forked.run([__file__, str(here)], tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    for case, losses in json.loads(here.read_text(encoding="utf-8"))["losses"].items():
        assert len(losses) >= len(recorded[case]) // INTERPRETED_SHARE, case
        assert losses == pytest.approx(recorded[case][: len(losses)], rel=TOLERANCE), case


def main(path: Path) -> None:
    world = init_distributed()
    losses = {case: losses_of(case, world, path.parent / case) for case in CASES}
    disconnect()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    path.write_text(json.dumps({"recorded_at": commit.stdout.strip(), "losses": losses}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    from fastunlearn.utils.environment import prepare_environment

    prepare_environment(cpu_threads=1)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN)
