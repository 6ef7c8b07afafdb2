"""The training loop, readable top to bottom: the algorithm of the paper, one update after the other.

What this is: how a run is put together and what happens in one update.
What this is not: the mathematics of a method (``methods/``), sharding (``zero.py``), or the files that remain
(``results.py``).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastunlearn.attention import install_attention
from fastunlearn.backbone import build_backbone, load_pipeline, set_trainable, trainable_names
from fastunlearn.checkpoint import Position, find_checkpoint, load_checkpoint, save_checkpoint
from fastunlearn.config import Config, resolved_scope
from fastunlearn.keysteps import KeyStep
from fastunlearn.methods import Method, build_method
from fastunlearn.predictors import Evaluations, Predictors
from fastunlearn.prompts import build_prompt_book
from fastunlearn.recorder import Recorder
from fastunlearn.results import RunFigures, start_output, write_results
from fastunlearn.rollout import GuidedPair, Layout, Rollout
from fastunlearn.teacher import Teacher
from fastunlearn.zero import Engine, World
from fastunlearn_kernels.backend import describe


@dataclass
class Run:
    """The parts of a run, ready for its first update."""

    cfg: Config
    world: World
    method: Method
    table: list[KeyStep]
    models: Predictors
    rollout: Rollout
    engine: Engine
    position: Position = field(default_factory=lambda: Position(0, 0.0, 0.0, asdict(Evaluations())))


def train(cfg: Config, world: World) -> None:
    """Erase the concepts of ``cfg`` and leave the results in ``cfg.output_dir``. Every rank calls it."""
    run = prepare(cfg, world)
    if world.is_main:
        start_output(cfg, resumed=run.position.update > 0)
    update_loop(run)
    weights = run.engine.full_weights()
    if world.is_main:
        done = run.position
        figures = RunFigures(
            updates=done.update,
            seconds={
                "total": done.seconds,
                "rollout": done.rollout_seconds,
                "train": done.seconds - done.rollout_seconds,
            },
            # Every rank evaluates as much as this one.
            unet_evaluations={name: count * world.world_size for name, count in done.evaluations.items()},
            world_size=world.world_size,
            device=world.device,
        )
        write_results(cfg, weights, figures)


def prepare(cfg: Config, world: World) -> Run:
    """Load the model, embed all prompts once, free what training does not need, shard the rest, resume if asked."""
    method = build_method(cfg)
    resume = find_checkpoint(cfg)
    pipeline = load_pipeline(cfg.model.pretrained_model_name_or_path, options=cfg.model)
    book = build_prompt_book(cfg.concepts, cfg.prompts, cfg.seed)
    half = cfg.model.mixed_precision == "bf16"
    sharded_half = half and cfg.zero.stage > 0  # at stage 0 the weights stay fp32 and the calls are autocast
    backbone = build_backbone(
        pipeline, book.texts, cfg.train.resolution, world.device, torch.bfloat16 if sharded_half else torch.float32
    )
    backbone.autocast = half and not sharded_half
    del pipeline  # with it go the text encoders and the VAE
    unet = backbone.unet.train()
    if cfg.model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    attention = install_attention(unet, cfg.model.attention)
    trained = trainable_names(unet, resolved_scope(cfg))
    set_trainable(unet, trained)
    teacher = Teacher(unet, trained, whole_copy=cfg.zero.stage == 3)
    engine = Engine(unet, cfg, world)
    models = Predictors(backbone, engine, engine.sampler, teacher)
    layout = Layout(world.rank, world.world_size, cfg.train.train_batch_size, cfg.train.gradient_accumulation_steps)
    sampler = cfg.sampler
    rollout = Rollout(
        models, book, layout, steps=sampler.num_inference_steps, guidance_scale=sampler.guidance_scale, seed=cfg.seed
    )
    run = Run(cfg, world, method, method.table(), models, rollout, engine)
    if world.is_main:
        count = sum(p.numel() for p in engine.named.values())
        how = f"{attention}; kernels: {describe(world.device)}; ZeRO-{cfg.zero.stage}"
        print(f"{cfg.method}: {len(trained)} tensors, {count:,} parameters trained; {how}")
    if resume is not None:
        _resume(run, resume)
    return run


def _resume(run: Run, folder: Path) -> None:
    run.position = load_checkpoint(folder, run.world, run.engine, run.rollout)
    run.models.evaluations = Evaluations(**run.position.evaluations)
    if run.world.is_main:
        print(f"resumed from {folder} at update {run.position.update}")


def update_loop(run: Run) -> None:
    """All updates that are left. ``run.position`` says in the end what they took."""
    recorder = Recorder(run.cfg, run.world, len(run.table), run.position.update)
    every = run.cfg.checkpoint.checkpointing_steps
    started, before = time.perf_counter(), run.position
    rollout_seconds = before.rollout_seconds
    for step in run.table[before.update :]:
        if step.restart:
            restarted = time.perf_counter()
            run.rollout.restart(step)
            rollout_seconds += time.perf_counter() - restarted
        learning_rate = run.engine.learning_rate
        losses = one_update(run, step)
        recorder.record(step, run.rollout.timesteps[step.index], losses, run.engine.grad_norm, learning_rate)
        seconds = before.seconds + time.perf_counter() - started
        run.position = Position(step.update + 1, seconds, rollout_seconds, asdict(run.models.evaluations))
        if every and run.position.update % every == 0 and run.position.update < len(run.table):
            recorder.flush()
            save_checkpoint(run.cfg, run.world, run.engine, run.rollout, run.position)
    recorder.close()


def one_update(run: Run, step: KeyStep) -> list[Tensor]:
    """One optimizer update at one key step; then the trajectories move on with the predictions that it made anyway."""
    losses: list[Tensor] = []
    pairs: list[GuidedPair] = []
    for window in run.rollout.windows(step, run.method.augmentation(step)):
        outcome = run.method.loss(run.models, window)
        run.engine.backward(outcome.loss)
        run.engine.step()
        losses.append(outcome.loss.detach())
        if outcome.pair is not None:
            pairs.append(outcome.pair)
    if step.continues:
        run.rollout.advance(step, pairs)
    return losses
