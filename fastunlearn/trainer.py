"""The training loop, readable top to bottom: the algorithm of the paper, one update after the other.

What this is: how a run is put together and what happens in one update.
What this is not: the mathematics of a method (``methods/``), sharding (``zero.py``), or the files that remain
(``results.py``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastunlearn.anchor_windows import AnchorWindows
from fastunlearn.attention import install_attention, stop_first_token_gradient
from fastunlearn.backbone import (
    Backbone,
    build_backbone,
    load_pipeline,
    set_trainable,
    trainable_names,
    trained_tensors,
)
from fastunlearn.checkpoint import Part, Position, find_checkpoint, load_checkpoint, save_checkpoint
from fastunlearn.config import Config, resolved_scope
from fastunlearn.fused import FusedEngine
from fastunlearn.keysteps import KeyStep
from fastunlearn.methods import Method, build_method
from fastunlearn.predictors import Evaluations, Predictors
from fastunlearn.prompts import PromptBook, build_prompt_book
from fastunlearn.recorder import Recorder, Update
from fastunlearn.results import RunFigures, start_output, write_results
from fastunlearn.retain import (
    Pool,
    RetainSource,
    anchor_prompts,
    build_source,
    encode_folder,
    generate_pool,
    retain_loss,
)
from fastunlearn.retain_prompts import retain_prompts
from fastunlearn.rollout import GuidedPair, Layout, Rollout
from fastunlearn.surgery import Figures, Surgery
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
    rollout: Rollout | AnchorWindows
    engine: Engine | FusedEngine
    surgery: Surgery | None = None
    retain: RetainSource | None = None
    position: Position = field(default_factory=lambda: Position(0, 0.0, 0.0, asdict(Evaluations())))

    @property
    def parts(self) -> dict[str, Part]:
        """What else carries state from one update to the next."""
        found: dict[str, Part | None] = {
            "rollout": self.rollout, "method": self.method, "surgery": self.surgery, "retain": self.retain,
        }  # fmt: skip
        return {name: part for name, part in found.items() if part is not None}


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
    folder = encode_folder(cfg, pipeline, world.device) if cfg.retains and cfg.retain_source == "folder" else None
    retained = folder.prompts if folder is not None else retain_prompts(cfg) if cfg.retains else []
    book = build_prompt_book(cfg.concepts, cfg.prompts, cfg.seed, retained)
    set_trainable(pipeline.unet, trainable_names(pipeline.unet, resolved_scope(cfg)))
    originals = trained_tensors(pipeline.unet)
    backbone = build_backbone(pipeline, book.texts, cfg.train.resolution, world.device, weights_dtype(cfg))
    del pipeline  # with it go the text encoders and the VAE
    models, engine = shard(cfg, backbone, originals, world)
    del originals
    layout = Layout(world.rank, world.world_size, cfg.train.train_batch_size, cfg.train.gradient_accumulation_steps)
    pool = None if method.trajectories else generate_pool(cfg, models, book, anchor_prompts(book))
    rollout = build_windows(cfg, models, book, layout, pool)
    run = Run(cfg, world, method, method.table(), models, rollout, engine)
    if cfg.retains:
        pictures = pool if cfg.retain_source == "anchors" else folder
        run.retain = build_source(cfg, models, book, world, pictures)
        run.surgery = Surgery(cfg.surgery, cfg.train.max_grad_norm, list(engine.named), world, cfg.zero_stage > 0)
    if resume is not None:
        _resume(run, resume)
    return run


def weights_dtype(cfg: Config) -> torch.dtype:
    """In which the U-Net is held."""
    return torch.bfloat16 if cfg.bf16_weights else torch.float32


def shard(
    cfg: Config, backbone: Backbone, originals: Mapping[str, Tensor], world: World
) -> tuple[Predictors, Engine | FusedEngine]:
    """The student under its engine, and its frozen original. ``originals``: the trained tensors before any cast."""
    unet = backbone.unet.train()
    backbone.autocast = cfg.model.mixed_precision == "bf16" and not cfg.bf16_weights
    if cfg.model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    attention = install_attention(unet, cfg.model.attention)
    if cfg.method == "doco" and cfg.doco.stop_bos_gradient:
        stop_first_token_gradient(unet)
    teacher = Teacher(unet, list(originals), whole_copy=cfg.zero_stage == 3)
    engine: Engine | FusedEngine
    if cfg.engine == "fused":
        engine = FusedEngine(unet, cfg, world)
    else:
        engine = Engine(unet, cfg, world, originals if cfg.bf16_weights else None)
    if world.is_main:
        count = sum(p.numel() for p in originals.values())
        sharding = "fused engine" if cfg.engine == "fused" else f"ZeRO-{cfg.zero.stage}"
        how = f"{attention}; kernels: {describe(world.device)}; {sharding}"
        print(f"{cfg.method}: {len(originals)} tensors, {count:,} parameters trained; {how}")
    return Predictors(backbone, engine, engine.sampler, teacher), engine


def build_windows(
    cfg: Config, models: Predictors, book: PromptBook, layout: Layout, pool: Pool | None
) -> Rollout | AnchorWindows:
    """Where the unlearning windows come from: trajectories, or noised pictures of the anchors."""
    if pool is not None:
        return AnchorWindows(cfg, models, book, layout, pool)
    sampler = cfg.sampler
    return Rollout(
        models, book, layout, steps=sampler.num_inference_steps, guidance_scale=sampler.guidance_scale, seed=cfg.seed
    )


def _resume(run: Run, folder: Path) -> None:
    run.position = load_checkpoint(folder, run.world, run.engine, run.parts)
    run.models.evaluations = Evaluations(**run.position.evaluations)
    if run.world.is_main:
        print(f"resumed from {folder} at update {run.position.update}")


def update_loop(run: Run) -> None:
    """All updates that are left. ``run.position`` says in the end what they took."""
    recorder = Recorder(run.cfg, run.world, len(run.table), run.position.update, run.surgery)
    every = run.cfg.checkpoint.checkpointing_steps
    started, before = time.perf_counter(), run.position
    rollout_seconds = before.rollout_seconds
    for step in run.table[before.update :]:
        if step.restart:
            restarted = time.perf_counter()
            run.rollout.restart(step)
            rollout_seconds += time.perf_counter() - restarted
        learning_rate = run.engine.learning_rate
        update = one_update(run, step)
        recorder.record(step, run.rollout.timesteps[step.index], update, run.engine.grad_norm, learning_rate)
        seconds = before.seconds + time.perf_counter() - started
        run.position = Position(step.update + 1, seconds, rollout_seconds, asdict(run.models.evaluations))
        if every and run.position.update % every == 0 and run.position.update < len(run.table):
            recorder.flush()
            save_checkpoint(run.cfg, run.world, run.engine, run.parts, run.position)
    recorder.close()


def one_update(run: Run, step: KeyStep) -> Update:
    """One optimizer update at one key step; then the trajectories move on with the predictions that it made anyway.

    With surgery: the gradient of what is kept first, out of the engine's hands; then that of what is erased, from which
    everything that points against it is taken.
    """
    windows = list(run.rollout.windows(step, run.method.augmentation(step)))
    update = Update()
    if run.surgery is not None and windows[0].trains:
        update.retain_losses = retain_window(run, step)
    pairs: list[GuidedPair] = []
    for number, window in enumerate(windows, start=1):
        outcome = run.method.loss(run.models, window)
        if outcome.loss is not None:
            run.engine.backward(outcome.loss, last=number == len(windows))
            update.losses.append(outcome.loss.detach())
        if outcome.pair is not None:
            pairs.append(outcome.pair)
    if windows[0].trains:
        update.surgery = apply_gradient(run)
    update.figures = run.method.finish()
    if step.continues:
        run.rollout.advance(step, pairs)
    return update


def apply_gradient(run: Run) -> Figures | None:
    """Project, clip and step; without surgery, step. The fused engine has done all that, and is asked what it saw."""
    engine = run.engine
    if run.surgery is None:
        engine.step()
        return None
    if engine.steps_in_backward:
        figures = engine.figures()
    else:
        second_moments = engine.second_moments() if run.cfg.surgery.metric == "optimizer" else None
        figures = run.surgery.project(engine.gradient(), second_moments, run.cfg.optimizer.adam_epsilon)
    if run.surgery.is_finite(figures):
        engine.step(figures.plan.norm)
    else:
        engine.skip_step()
    return figures


def retain_window(run: Run, step: KeyStep) -> list[Tensor]:
    """The gradient of what must be kept, put aside as this rank's shard of it."""
    assert run.surgery is not None and run.retain is not None
    losses = []
    batches = run.retain.batches(step, run.rollout.timesteps[step.index])
    with run.engine.retain_window(run.surgery):
        for number, batch in enumerate(batches, start=1):
            loss = retain_loss(run.models, batch, run.cfg.retain.target)
            run.engine.backward(loss, last=number == len(batches))
            losses.append(loss.detach())
    return losses
