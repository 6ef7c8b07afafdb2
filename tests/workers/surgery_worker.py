"""Started by DeepSpeed's launcher in test_surgery_matrix.py: a few updates with surgery in every configuration.

Usage: deepspeed --num_gpus N tests/workers/surgery_worker.py FOLDER WHAT ...
    cases, or the name of one   ``cases()``, for two ranks; writes FOLDER/<case>.safetensors and <case>-start
    few                         ``cases_for_other_worlds()``, the same files
    faults                      those of surgery_faults.py; every rank writes what it sees
    broken                      those of broken_updates.py, without surgery; every rank writes what it sees
    mutations                   those of surgery_mutations.py; writes FOLDER/mutation-<number>.safetensors
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
sys.path[:0] = [str(p) for p in (ROOT, ROOT / "kernels", TESTS / "support", TESTS / "workers", TESTS / "mutation")]

from fastunlearn.utils.environment import prepare_environment

if __name__ == "__main__":
    prepare_environment(1)

import torch
from broken_updates import ZERO_RUNS, BrokenRun, broken_config, suffer_broken_updates
from safetensors.torch import save_file
from surgery_case import Case, build_run, cases, cases_for_other_worlds, trained_names
from surgery_faults import FAULTS, UPDATES, Fault, suffer
from surgery_mutations import MUTATIONS, applied
from tiny import tiny_prompts, tiny_unet
from tiny_run import tiny_run, update_all

from fastunlearn.training.setup import Run
from fastunlearn.utils.distributed import World, disconnect, init_distributed


def build_broken_run(case: BrokenRun, world: World) -> Run:
    return tiny_run(broken_config(case), world, tiny_prompts(), trained_names(tiny_unet()))


def train_case(case: Case, world: World) -> dict[str, torch.Tensor]:
    run = build_run(case, world)
    update_all(run)
    return run.engine.export_weights().trained


def mutated_case(name: str) -> Case:
    """The case that a mutation names: "stage2-k1-offload"; clipped, per tensor, with an exact retain gradient."""
    stage, accumulation, accumulate = int(name[5]), int(name[8]), "fp32" if name.endswith("fp32") else "auto"
    precision = "bf16" if accumulate == "fp32" else "no"
    return Case(stage, "offload" in name, accumulation, False, True, "tensor", "auto", precision, accumulate=accumulate)


def faulty_case(fault: Fault) -> Case:
    extra = (("max_skipped_updates", 2),)
    return Case(fault.stage, fault.offload, 1, False, True, "tensor", "auto", extra=extra, updates=UPDATES)


def main(folder: Path, what: list[str]) -> None:
    world = init_distributed()
    chosen = [case for case in cases() if "cases" in what or case.name in what]
    for case in chosen + (cases_for_other_worlds() if "few" in what else []):
        run = build_run(case, world)
        start = run.engine.export_weights().trained
        update_all(run)
        weights = run.engine.export_weights().trained
        if world.is_main:
            save_file(start, folder / f"{case.name}-start.safetensors")
            save_file(weights, folder / f"{case.name}.safetensors")
    for fault in FAULTS if "faults" in what else []:
        suffer(fault, build_run(faulty_case(fault), world), folder)
    for broken in ZERO_RUNS if "broken" in what else []:
        seen = suffer_broken_updates(broken, build_broken_run(broken, world))
        (folder / f"{broken.name}-rank-{world.rank}.json").write_text(json.dumps(seen))
    for number, mutation in enumerate(MUTATIONS if "mutations" in what else []):
        with applied(mutation), contextlib.suppress(LookupError, RuntimeError, AttributeError):
            weights = train_case(mutated_case(mutation.case), world)
            if world.is_main:
                save_file(weights, folder / f"mutation-{number}.safetensors")
    disconnect()
    print(f"rank {world.rank} done")


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    main(Path(arguments[0]), arguments[1:])
