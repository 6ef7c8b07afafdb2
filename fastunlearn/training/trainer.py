"""The training loop, readable top to bottom: the algorithm of the paper, one update after the other.

How a run is put together is in ``setup.py``, the mathematics of a method in ``methods/``, what an engine makes of a
loss in ``engines/``, the files that remain in ``export/results.py``.
"""

from __future__ import annotations

import gc
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.denoisers.predictors import Evaluations
from fastunlearn.engines.base import ExportedWeights
from fastunlearn.export.results import Results, RunFigures, keep_weights, start_output, write_results
from fastunlearn.methods.base import no_loss
from fastunlearn.sampling.batch import GuidedPrediction
from fastunlearn.sampling.key_steps import KeyStep
from fastunlearn.sampling.retain import retain_loss
from fastunlearn.training.checkpoint import Position
from fastunlearn.training.recorder import Recorder, Update
from fastunlearn.training.saving import Saver, drop_unasked
from fastunlearn.training.setup import Run, edit, prepare
from fastunlearn.utils.distributed import World, all_reduce_counts, ranks_here
from fastunlearn.utils.processes import stop


def train(cfg: Config, world: World, resume: Path | None = None) -> Results | None:
    """Erase the concepts of ``cfg`` and leave the results in ``cfg.output_dir``. Every rank calls it; the first one
    gets to know what is there.

    ``resume``: the checkpoint to go on from.
    """
    if not cfg.trains:
        return edit_only(cfg, world)
    with stop.bound_to(ranks_here()):
        cfg, weights, figures, saved = train_weights(cfg, world, resume)
    if not world.is_main:
        return None
    results = write_results(cfg, weights, figures, saved)
    if not results.missing:
        drop_unasked(Path(cfg.output_dir))
    return results


class Trained(NamedTuple):
    """What all updates have made."""

    cfg: Config
    """As it was given, but for ``keep`` where the run has chosen what it keeps."""
    weights: ExportedWeights
    figures: RunFigures
    saved: Path | None
    """Where the weights are on the disk."""


def train_weights(cfg: Config, world: World, resume: Path | None) -> Trained:
    """All updates. Before anything else can fail, what they have made is on the disk."""
    run = prepare(cfg, world, resume)
    cfg = cfg.model_copy(update={"keep": run.cfg.keep})
    if world.is_main:
        start_output(cfg, resumed=resume is not None)
    saver = Saver(run)
    with stop.between_updates():
        update_loop(run, saver)
        weights, done = run.final_weights(), run.position
        saved = keep_weights(cfg, weights) if world.is_main else None
        saver.save_last(run)
    evaluations = all_reduce_counts(asdict(run.models.evaluations), world)
    probe_seconds, progress = (0.0, None) if run.watch is None else (run.watch.seconds, run.watch.progress)
    rate = run.cfg.learning_rate
    del run
    gc.collect()  # hooks hold the engine in cycles; what follows needs the memory for the model itself
    seconds = divided(done.seconds, done.rollout_seconds, probe_seconds)
    figures = RunFigures(done.update, seconds, evaluations, world.world_size, world.device, progress, rate)
    return Trained(cfg, weights, figures, saved)


def edit_only(cfg: Config, world: World) -> Results | None:
    """A closed-form method: no engine, no optimizer, no updates. The first rank does it; it takes seconds."""
    if not world.is_main:
        return None
    done = edit(cfg, world)
    cfg = cfg.model_copy(update={"keep": done.keep})
    start_output(cfg, resumed=False)
    print(f"{cfg.method}: {len(done.tensors)} tensors edited in closed form in {done.seconds:.1f} s")
    seconds = divided(done.seconds + done.probe_seconds, 0.0, done.probe_seconds)
    evaluations = asdict(Evaluations(probe=done.evaluations))
    figures = RunFigures(0, seconds, evaluations, world.world_size, world.device, done.progress)
    weights = ExportedWeights({}, done.tensors)
    return write_results(cfg, weights, figures, keep_weights(cfg, weights))


def divided(total: float, rollout: float, probe: float) -> dict[str, float]:
    """A run's seconds by what they were spent on; the rest is training."""
    return {"total": total, "rollout": rollout, "probe": probe, "train": total - rollout - probe}


def update_loop(run: Run, saver: Saver) -> None:
    """Updates until the concepts are gone, or none is left. ``run.position`` says in the end what they took."""
    recorder = Recorder(run.cfg, run.world, len(run.steps), run.position.update, run.engine.projected_segments)
    started, before = time.perf_counter(), run.position
    rollout_seconds = before.rollout_seconds
    while (step := run.next_step()) is not None:
        if step.restart:
            restarted = time.perf_counter()
            run.rollout.restart(step)
            rollout_seconds += time.perf_counter() - restarted
        learning_rate = run.engine.learning_rate
        update = one_update(run, step)
        recorder.record(step, run.rollout.timesteps[step.index], update, run.engine.grad_norm, learning_rate)
        if run.look_is_due(step.update + 1):
            recorder.show_probe(run.look(step.update + 1))
        seconds = before.seconds + time.perf_counter() - started
        run.position = Position(step.update + 1, seconds, rollout_seconds, asdict(run.models.evaluations))
        saver.after_update(run, recorder)
    recorder.close()
    run.engine.guard.check_end()


def one_update(run: Run, step: KeyStep) -> Update:
    """One optimizer update at one key step; then the trajectories move on with the predictions that it made anyway.

    First the gradients that wait: that of the meta term, at the attacked weights, and that of what must be kept. Then
    that of what is erased, which the engine transforms with them, refuses where it is not finite, and applies.
    """
    batches = list(run.rollout.batches(step, run.method.augmentation(step)))
    update, trains = Update(), all(batch.trains for batch in batches)
    if trains and run.meta is not None and run.meta.is_due(step):
        update.figures |= run.meta.capture(step, run.rollout.timesteps[step.index])
    if trains and run.retain is not None:
        update.retain_losses = capture_retain_gradient(run, step)
    predictions: list[GuidedPrediction] = []
    for number, batch in enumerate(batches, start=1):
        output = run.method.loss(run.models, batch)
        if output.loss is not None:
            run.engine.backward(output.loss, last=number == len(batches))
            update.losses.append(output.loss.detach())
        if output.guided is not None:
            predictions.append(output.guided)
    if not batches:  # after an edit in closed form: the update is what has been stored
        run.engine.backward(no_loss(run.engine.named.values()), last=True)
    if trains:
        update.applied = run.engine.apply()
        if update.applied.stepped and run.ema is not None:
            run.ema.update()
    update.figures |= run.method.finish()
    if step.continues:
        run.rollout.advance(step, predictions)
    return update


def capture_retain_gradient(run: Run, step: KeyStep) -> list[Tensor]:
    """The gradient of what must be kept, stored as this rank's shard of it; its losses."""
    assert run.retain is not None
    losses = []
    batches = run.retain.batches(step, run.rollout.timesteps[step.index])
    with run.engine.capture_gradient("retain"):
        for number, batch in enumerate(batches, start=1):
            loss = retain_loss(run.models, batch, run.cfg.retain.target)
            run.engine.backward(loss, last=number == len(batches))
            losses.append(loss.detach())
    return losses
