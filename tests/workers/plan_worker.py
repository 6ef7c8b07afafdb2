"""Started by DeepSpeed's launcher in test_planning.py: what a rank really holds, and how often it calls the U-Net.

Usage: deepspeed --num_gpus N plan_worker.py FOLDER [STATE_CASE ...]; every rank writes FOLDER/<case>-<rank>.json,
without names for all cases.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
sys.path[:0] = [str(p) for p in (ROOT, ROOT / "kernels", TESTS / "support", TESTS / "workers", TESTS / "mutation")]

from fastunlearn.utils.environment import prepare_environment

if __name__ == "__main__":
    prepare_environment(1)

import torch
from tiny import tiny_backbone, tiny_unet
from tiny_run import start_anew, tiny_run, update_all
from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.config.run_prompts import retain_prompts
from fastunlearn.engines.zero.engine import ZeroEngine
from fastunlearn.methods.tables import build_method, rank_table
from fastunlearn.models.parameter_names import set_trainable, trainable_names, trained_tensors
from fastunlearn.planning.activations import LiveBytes
from fastunlearn.prompts.variants import PromptTable, build_prompt_table
from fastunlearn.sampling.batch import BatchLayout
from fastunlearn.sampling.image_pool import LatentPool, generate_pool
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.retain import anchor_prompts, build_source, retain_loss
from fastunlearn.training.setup import Run, build_sampler, shard
from fastunlearn.utils.distributed import World, disconnect, init_distributed

WORLD = 2
SCOPE = "full"  # of the tiny U-Net, so that there are partitions large enough for 8-bit state
RETAINED = ["a cat", "a house in ink style"]

# name -> fields; Options share cases to save time.
STATE_CASES: dict[str, dict[str, Any]] = {
    "stage0-int8": {"zero": {"stage": 0}, "surgery": {"retain_dtype": "int8"}},
    "stage0-8bit": {"zero": {"stage": 0}, "optimizer": {"name": "adamw8bit"}},
    "stage1-ema": {"zero": {"stage": 1}, "surgery": {"retain_ema": 0.5}},
    "stage1-bf16-kept-fp32": {
        "zero": {"stage": 1}, "model": {"mixed_precision": "bf16"}, "surgery": {"retain_dtype": "fp32"},
    },
    "stage1-offload": {"zero": {"stage": 1, "offload_optimizer": "cpu"}},
    "stage2-bf16": {"zero": {"stage": 2}, "model": {"mixed_precision": "bf16"}},
    "stage2-8bit-int8": {
        "zero": {"stage": 2}, "optimizer": {"name": "adamw8bit"}, "surgery": {"retain_dtype": "int8"},
    },
    "stage2-accumulation": {
        "zero": {"stage": 2}, "train": {"gradient_accumulation_steps": 2}, "surgery": {"retain_dtype": "bf16"},
    },
    "stage2-fp32-sums": {"zero": {"stage": 2, "grad_accum_dtype": "fp32"}, "model": {"mixed_precision": "bf16"}},
    "stage2-offload-int8": {"zero": {"stage": 2, "offload_optimizer": "cpu"}, "surgery": {"retain_dtype": "int8"}},
    "stage3-8bit-int8": {
        "zero": {"stage": 3}, "optimizer": {"name": "adamw8bit"}, "surgery": {"retain_dtype": "int8"},
    },
    "stage3-bf16-offload": {
        "zero": {"stage": 3, "offload_optimizer": "cpu"}, "model": {"mixed_precision": "bf16"},
        "surgery": {"retain_dtype": "bf16"},
    },
}  # fmt: skip

SURGERY = {"surgery": {"enabled": True}}
ANCHORED = {"concepts": [{"name": "neon style", "anchor": "ink style"}], "keep": ["cat"]}
DOCO = ANCHORED | {"method": "doco", "doco": {"discriminator_warmup": 1}}
COUNT_CASES: dict[str, dict[str, Any]] = {
    "kscu-uncond": {"kscu": {"uncond_gradient": True}},
    "kscu-generated": SURGERY | {"train": {"gradient_accumulation_steps": 2, "train_batch_size": 2}},
    "kscu-prompts": SURGERY | {"retain": {"source": "prompts"}},
    "esd": {"method": "esd"},
    "sdd": {"method": "sdd"},
    "kscu-spread": {  # two concepts whose slices differ, so that the ranks do not evaluate the same
        "concepts": ["neon style", "cat"],
        "keep": ["tree"],
        "kscu": {"loop": 1},
        "train": {
            "max_train_steps": 4,
            "spread_concepts": True,
            "scope": "attn2",
        },
    },
    "doco-guided": DOCO | {"doco": {"discriminator_warmup": 1, "guidance_scale": 3.0}},
    "doco-generated": DOCO | {"retain": {"source": "generated", "target": "noise"}},
}


def state_config(name: str) -> Config:
    fields = {
        "concepts": ["neon style"],
        "progress": {"enabled": False},
        "kscu": {"start": 0},
        "sampler": {"num_inference_steps": 4},
        "train": {"max_train_steps": 1, "scope": SCOPE, "learning_rate": 1e-5},
        "surgery": {"enabled": True},
        "retain": {"batch_size": 1, "target": "noise"},
        "zero": {"reduce_bucket_size": 20_000},
    }
    return Config.model_validate(_merged(fields, STATE_CASES[name]))


def count_config(name: str) -> Config:
    fields = {
        "concepts": ["neon style"],
        "progress": {"enabled": False},
        "kscu": {"start": 20, "loop": 1},
        "prompts": {"augment_fraction": 0.4},
        "sampler": {"num_inference_steps": 4},
        "train": {"max_train_steps": 4, "learning_rate": 1e-5},
        "retain": {"batch_size": 2, "num_images": 3, "num_inference_steps": 2},
    }
    return Config.model_validate(_merged(fields, COUNT_CASES[name]))


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    nested = {key: base[key] | value for key, value in extra.items() if isinstance(value, dict) and key in base}
    return base | extra | nested


def storage_bytes(tensors: Iterable[Tensor], without: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    ignored = {tensor.untyped_storage().data_ptr() for tensor in without}
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for pointer, size in found.items() if pointer not in ignored)


def held(cfg: Config, world: World) -> dict[str, Any]:
    """Bytes of everything that the plan has a row for, between the first optimizer step and the second; and the cut."""
    prompt_table = build_prompt_table(cfg.concepts, cfg.prompts, cfg.seed, RETAINED)
    draw = torch.Generator().manual_seed(3)
    pool = LatentPool(torch.randn(2, 4, 8, 8, generator=draw), RETAINED)
    run = tiny_run(cfg, world, prompt_table, trainable_names(tiny_unet(), SCOPE), pool)
    step = run.table[0]
    run.rollout.restart(step)
    _unlearn(run, step)
    _step(run)  # which makes the optimizer's state
    found: dict[str, Any] = {"keep_peak": _retain(run, step)}
    kept: Any = _engine(run).transforms.stored["retain"]._stored
    found["kept"] = storage_bytes([*kept.codes, *kept.absmax] if hasattr(kept, "codes") else kept or [])
    _unlearn(run, step)
    found |= _states(run)
    found["cut"] = cut_by_deepspeed(run)
    if cfg.optimizer.name == "adamw":
        with LiveBytes(_all_tensors()) as live:
            _step(run)
        found["update_peak"] = live.peak
    return found


def _retain(run: Run, step: KeyStep) -> int:
    """The retain window; returns the peak of what is allocated while its gradient is put aside."""
    assert run.retain is not None
    batches = run.retain.batches(step, run.rollout.timesteps[step.index])
    for number, batch in enumerate(batches, start=1):
        run.engine.backward(retain_loss(run.models, batch, "noise"), last=number == len(batches))
    with LiveBytes(_all_tensors()) as live:
        _engine(run).transforms.store("retain", _engine(run)._shards.take())
    return live.peak


def _engine(run: Run) -> ZeroEngine:
    assert isinstance(run.engine, ZeroEngine)
    return run.engine


def _step(run: Run) -> None:
    """DeepSpeed's own, without transforms."""
    _engine(run).engine.set_gradient_accumulation_boundary(True)
    _engine(run).engine.step()


def _all_tensors() -> list[Tensor]:
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def _unlearn(run: Run, step: KeyStep) -> None:
    windows = list(run.rollout.batches(step, None))
    for number, window in enumerate(windows, start=1):
        loss = run.method.loss(run.models, window).loss
        assert loss is not None
        run.engine.backward(loss, last=number == len(windows))


def _states(run: Run) -> dict[str, int]:
    engine, stage = _engine(run).engine, run.cfg.zero.stage
    optimizer, module = engine.optimizer, engine.module
    parameters = list(module.parameters())
    weights = [p.ds_tensor if stage == 3 else p for p in parameters]
    flats = _engine(run)._shards._flat_partitions() if stage else []
    teacher: Any = run.models.teacher
    copies = [] if teacher._swap else list(teacher._module.parameters())
    inner = getattr(optimizer, "optimizer", optimizer)
    return {
        "weights": storage_bytes(weights),
        "teacher": storage_bytes([*teacher.frozen.values(), *copies]),
        "masters": storage_bytes(flats, without=weights),
        "optimizer": storage_bytes(_optimizer_tensors(inner)),
        "gradients": storage_bytes(_gradients(run, optimizer, stage, flats)),
    }


def cut_by_deepspeed(run: Run) -> list[tuple[int, list[int]]]:
    """(elements with padding, elements of each parameter) of each flat partition that this rank owns."""
    shards = _engine(run)._shards
    flats = shards._flat_partitions() if run.cfg.zero.stage else []
    return [(flat.numel(), [length for *_, length, _ in shards._walk(group)]) for group, flat in enumerate(flats)]


def _optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and not name.startswith("qmap"):  # one table for all
                yield value


def _gradients(run: Run, optimizer: Any, stage: int, flats: list[Tensor]) -> Iterator[Tensor]:
    yield from (piece.tensor for piece in _engine(run)._shards.read())
    if stage == 3:
        yield optimizer.grad_partitions_flat_buffer
    if run.cfg.zero.offload_optimizer == "cpu":
        yield from (flat.grad for flat in flats if flat.grad is not None)
        yield from getattr(optimizer, "accumulated_grads_in_cpu", {}).values()


def counted(cfg: Config, world: World) -> dict[str, int]:
    """The run's own counters, put together as ``trainer.prepare`` does."""
    retained = retain_prompts(cfg) if cfg.retains else []
    prompt_table: PromptTable = build_prompt_table(cfg.concepts, cfg.prompts, cfg.seed, retained)
    start_anew()
    backbone = tiny_backbone(prompt_table, autocast=cfg.autocast)
    set_trainable(backbone.unet, trainable_names(backbone.unet, "attn2"))
    originals = trained_tensors(backbone.unet)
    assert cfg.weight_dtype == "fp32"
    models, engine, ema = shard(cfg, backbone, originals, world)
    method = build_method(cfg)
    layout = BatchLayout(
        world.rank, world.world_size, cfg.train.train_batch_size, cfg.train.gradient_accumulation_steps
    )
    pool = (
        None
        if method.spec.samples != "anchors"
        else generate_pool(cfg, models, prompt_table, anchor_prompts(prompt_table))
    )
    table = rank_table(cfg, world.rank, world.world_size)
    run = Run(
        cfg, world, method, table, models, build_sampler(cfg, models, prompt_table, layout, pool), engine, ema=ema
    )
    if cfg.retains:
        run.retain = build_source(cfg, models, prompt_table, world, pool if cfg.retain_source == "anchors" else None)
    update_all(run)
    return asdict(models.evaluations)


def main(folder: Path, chosen: list[str]) -> None:
    world = init_distributed()
    gc.collect()
    gc.freeze()  # what the libraries have made need not be looked at for every case
    for name in chosen or STATE_CASES:
        (folder / f"{name}-{world.rank}.json").write_text(json.dumps(held(state_config(name), world)))
    for name in () if chosen else COUNT_CASES:
        (folder / f"{name}-{world.rank}.json").write_text(json.dumps(counted(count_config(name), world)))
    disconnect()


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    main(Path(arguments[0]), arguments[1:])
