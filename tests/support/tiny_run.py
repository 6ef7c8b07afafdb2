"""A run around the tiny U-Net, put together by the trainer's own functions, for what DeepSpeed's launcher starts.

Not a test itself, and not a worker: those choose the configurations and write down what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tiny import tiny_backbone, tiny_rollout

from fastunlearn.config import Config
from fastunlearn.methods.tables import build_method
from fastunlearn.models import parameter_names
from fastunlearn.models.parameter_names import set_trainable, trained_tensors
from fastunlearn.prompts.variants import PromptTable
from fastunlearn.sampling.base import BatchSampler, EmptySampler
from fastunlearn.sampling.batch import BatchLayout
from fastunlearn.sampling.image_pool import LatentPool
from fastunlearn.sampling.retain import PoolSource
from fastunlearn.training.setup import Run, shard, with_learning_rate
from fastunlearn.training.trainer import one_update
from fastunlearn.utils.distributed import World
from fastunlearn.utils.dtypes import DTYPES

LINEAR = torch.nn.functional.linear
SMALL_TENSOR_NUMEL = 100  # so that matrices and biases are in groups of their own, as SDXL's are


def tiny_run(
    cfg: Config, world: World, prompt_table: PromptTable, names: Sequence[str], pool: LatentPool | None = None
) -> Run:
    """A run that trains the tensors ``names``; with surgery where there is a ``pool`` of pictures to keep."""
    parameter_names.SMALL_TENSOR_NUMEL = SMALL_TENSOR_NUMEL
    start_anew()
    backbone = tiny_backbone(prompt_table, autocast=cfg.autocast)
    set_trainable(backbone.unet, names)
    originals = trained_tensors(backbone.unet)
    backbone.unet.to(DTYPES[cfg.weight_dtype])
    backbone.embeds = backbone.embeds.to(torch.device("cpu"), DTYPES[cfg.weight_dtype])
    cfg = with_learning_rate(cfg, originals)
    models, engine, ema = shard(cfg, backbone, originals, world)
    layout = BatchLayout(
        world.rank, world.world_size, cfg.train.train_batch_size, cfg.train.gradient_accumulation_steps
    )
    rollout: BatchSampler
    if cfg.closed_form:
        rollout = EmptySampler(models, cfg.sampler.num_inference_steps)
    else:
        rollout = tiny_rollout(models, prompt_table, layout, steps=cfg.sampler.num_inference_steps)
    method = build_method(cfg)
    run = Run(cfg, world, method, method.table(), models, rollout, engine, ema=ema)
    if pool is not None:
        run.retain = PoolSource(cfg, models, prompt_table, layout, pool)
    return run


def start_anew() -> None:
    """For one run of several in a process: ZeRO-3 puts a linear of its own, a slower one, in the place of torch's."""
    torch.nn.functional.linear = LINEAR


def update_all(run: Run) -> None:
    """Every update of the run, without logs and checkpoints."""
    for step in run.table:
        if step.restart:
            run.rollout.restart(step)
        one_update(run, step)
