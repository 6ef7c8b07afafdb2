"""The training loop, readable top to bottom: the algorithm of the paper, one update after the other.

What this is: what happens in a run, and in one update.
What this is not: how a run is put together (``assembly.py``), the mathematics of a method (``methods/``), sharding
(``zero.py``), or the files that remain (``results.py``).
"""

from __future__ import annotations

import gc
import time
from dataclasses import asdict

from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.denoisers.predictors import Evaluations
from fastunlearn.export.results import RunFigures, start_output, write_results
from fastunlearn.gradients.projection import Figures
from fastunlearn.methods.base import no_loss
from fastunlearn.sampling.batch import GuidedPrediction
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.retain import retain_loss
from fastunlearn.training.checkpoint import Position, save_checkpoint
from fastunlearn.training.recorder import Recorder, Update
from fastunlearn.training.setup import Run, edit, prepare
from fastunlearn.utils.distributed import World, all_reduce_counts


def train(cfg: Config, world: World) -> None:
    """Erase the concepts of ``cfg`` and leave the results in ``cfg.output_dir``. Every rank calls it."""
    if not cfg.trains:
        return edit_only(cfg, world)
    run = prepare(cfg, world)
    if world.is_main:
        start_output(cfg, resumed=run.position.update > 0)
    update_loop(run)
    weights, done = run.full_weights(), run.position
    evaluations = all_reduce_counts(asdict(run.models.evaluations), world)
    del run
    gc.collect()  # hooks hold the engine in cycles; what follows needs the memory for the model itself
    if world.is_main:
        seconds = {"total": done.seconds, "rollout": done.rollout_seconds, "train": done.seconds - done.rollout_seconds}
        figures = RunFigures(done.update, seconds, evaluations, world.world_size, world.device)
        write_results(cfg, weights, figures)


def edit_only(cfg: Config, world: World) -> None:
    """A closed-form method: no engine, no optimizer, no updates. The first rank does it; it takes seconds."""
    if not world.is_main:
        return
    start_output(cfg, resumed=False)
    weights, seconds = edit(cfg, world)
    print(f"{cfg.method}: {len(weights)} tensors edited in closed form in {seconds:.1f} s")
    figures = RunFigures(
        0, {"total": seconds, "rollout": 0.0, "train": seconds}, asdict(Evaluations()), world.world_size, world.device
    )
    write_results(cfg, weights, figures)


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

    With a meta term, its gradient at the attacked weights comes first, when there is nothing else to hold, and waits.
    With surgery: the gradient of what is kept, out of the engine's hands; then that of what is erased, from which
    everything that points against it is taken.
    """
    windows = list(run.rollout.windows(step, run.method.augmentation(step)))
    update, trains = Update(), all(window.trains for window in windows)
    if run.meta is not None and trains and run.meta.is_due(step):
        update.figures |= run.meta.window(step, run.rollout.timesteps[step.index])
    if run.surgery is not None and trains:
        update.retain_losses = retain_window(run, step)
    pairs: list[GuidedPrediction] = []
    for number, window in enumerate(windows, start=1):
        outcome = run.method.loss(run.models, window)
        if outcome.loss is not None:
            run.engine.backward(outcome.loss, last=number == len(windows))
            update.losses.append(outcome.loss.detach())
        if outcome.guided is not None:
            pairs.append(outcome.guided)
    if not windows:  # after an edit in closed form: the update is what has been put aside
        run.engine.backward(no_loss(run.engine.named.values()), last=True)
    if trains:
        update.surgery = apply_gradient(run)
    update.figures |= run.method.finish()
    if step.continues:
        run.rollout.advance(step, pairs)
    return update


def apply_gradient(run: Run) -> Figures | None:
    """Project, add the meta term, clip and step; what of it there is. The fused engine has done all that, and is asked
    what it saw. Returns the surgery's evidence."""
    engine, edits = run.engine, run.gradient_edits
    if not edits:
        engine.step()
        follow(run)
        return None
    if engine.steps_in_backward:
        seen = [engine.figures() for _ in edits]
    else:
        second_moments = engine.second_moments() if run.cfg.surgery.metric == "optimizer" else None
        seen = [edit.project(engine.gradient(), second_moments, run.cfg.optimizer.adam_epsilon) for edit in edits]
    if all([edit.is_finite(figures) for edit, figures in zip(edits, seen, strict=True)]):
        engine.step(seen[-1].plan.norm)
        follow(run)
    else:
        engine.skip_step()
    return seen[0] if run.surgery is not None else None


def follow(run: Run) -> None:
    """After an optimizer step: the running mean of the weights moves on, where there is one."""
    if run.ema is not None:
        run.ema.update()


def retain_window(run: Run, step: KeyStep) -> list[Tensor]:
    """The gradient of what must be kept, put aside as this rank's shard of it."""
    assert run.surgery is not None and run.retain is not None
    losses = []
    batches = run.retain.batches(step, run.rollout.timesteps[step.index])
    with run.engine.capture_gradient(run.surgery, "retain"):
        for number, batch in enumerate(batches, start=1):
            loss = retain_loss(run.models, batch, run.cfg.retain.target)
            run.engine.backward(loss, last=number == len(batches))
            losses.append(loss.detach())
    return losses
