"""The relearning test of a finished run: load, attack with every seed, measure on the way, put it together.

One U-Net is in memory: it is the original first, then the erased one, which every attack changes and gets back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fastunlearn.config import load_config
from fastunlearn.errors import UserError
from fastunlearn.evaluation.attacks.base import Embed
from fastunlearn.evaluation.attacks.fine_tuning import (
    Options,
    attack_steps,
    check_finite,
    denoising_error,
    edit,
    table,
)
from fastunlearn.evaluation.attacks.settings import Settings
from fastunlearn.evaluation.classifiers.base import Label, LoadedClassifier, choose_classifier
from fastunlearn.evaluation.evaluate import device_name, draw_samples
from fastunlearn.evaluation.label_cache import remembered
from fastunlearn.evaluation.pictures.grid import EvaluationGrid
from fastunlearn.evaluation.relearning.curve import area, steps_to_half, summary, summary_at
from fastunlearn.evaluation.relearning.pictures import ATTACK_SEED, HELD_OUT_SEED, Pictures
from fastunlearn.evaluation.relearning.recognition import CURVES, attack_grid, figures
from fastunlearn.evaluation.relearning.task import Task, check
from fastunlearn.models.backbone import Backbone, build_backbone
from fastunlearn.models.loading import Pipeline, load_pipeline, load_unet, resolve_model
from fastunlearn.models.public_name import public_name
from fastunlearn.prompts.variants import PromptTable
from fastunlearn.registry import ATTACKS
from fastunlearn.sampling.image_pool import LatentPool, encode_images
from fastunlearn.utils.run_folder import CONFIG, UNET

Point = dict[str, float | None]
RECOGNISED = 0.5
"""Share of the unedited model's pictures in which the concept must be seen: "half of it" has to mean something."""


@dataclass
class LoadedTask:
    """The model, what it is attacked with, and what it is measured with."""

    task: Task
    pipeline: Pipeline
    backbone: Backbone
    rows: dict[str, int]
    bar: tqdm
    classifier: LoadedClassifier | None = None
    grid: EvaluationGrid | None = None


def relearn(
    output_dir: str | Path, settings: Settings | None = None, baseline: str | Path | None = None, progress: bool = True
) -> dict:
    """Attack what a run left in ``output_dir``; nothing there is changed or written. Returns what relearn.json holds.

    Args:
        baseline: the output folder of another run with the same base model and concepts, attacked in the same way.

    Raises:
        UserError: bad folders, an attack that makes no sense, or one that diverged.
    """
    task = check(output_dir, settings or Settings(), baseline)
    started = time.perf_counter()
    with tqdm(total=0, unit="eval", unit_scale=True, desc="loading", disable=not progress) as bar:
        loaded = load(task, bar)
        _more(bar, len(task.folders) * _attack_evaluations(loaded))
        attacking, held_out = _pictures(loaded)
        _more(bar, len(held_out.prompts))
        bar.set_description("original")
        original = _measure_original(loaded, held_out)
        curves = {
            name: _attacked(loaded, folder, name, attacking, held_out, original)
            for name, folder in task.folders.items()
        }
    result = _described(loaded, len(attacking.prompts)) | {"original": original} | curves["model"]
    result["baseline"] = curves.get("baseline")
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def load(task: Task, bar: tqdm) -> LoadedTask:
    """The original model, with every prompt of the test embedded."""
    cfg = task.cfg
    device = torch.device(device_name())
    pipeline = load_pipeline(cfg.model.pretrained_model_name_or_path, options=cfg.model)
    prompt_table = PromptTable([], [], [*task.forbidden, *task.attacking])
    half = cfg.model.mixed_precision == "bf16"
    backbone = build_backbone(pipeline, prompt_table.texts, cfg.train.resolution, device, torch.float32, autocast=half)
    backbone.unet.eval().requires_grad_(False)
    if cfg.model.gradient_checkpointing:
        backbone.unet.enable_gradient_checkpointing()
    backbone.unet.register_forward_pre_hook(lambda _, args: _count(bar, len(args[0])))
    loaded = LoadedTask(task, pipeline, backbone, prompt_table.index, bar)
    if task.not_evaluated is None:
        loaded.classifier = choose_classifier(cfg).load(device.type)
        loaded.grid = attack_grid(cfg, task.settings.sampler_steps)
    return loaded


def measure(
    loaded: LoadedTask, embed: Embed, held_out: LatentPool, unet_dir: Path | None, remember: bool = True
) -> Point:
    """The figures of the model as it is now. ``remember``: they are those of the weights in ``unet_dir`` (None: of the
    original), so what the classifier sees need be drawn only once."""
    point: Point = dict.fromkeys(CURVES)
    if loaded.grid is not None and loaded.classifier is not None:
        classifier, grid = loaded.classifier, loaded.grid
        base = resolve_model(loaded.task.cfg.model.pretrained_model_name_or_path)

        def draw_first() -> list[Label]:
            _more(loaded.bar, _drawing(loaded))
            return label_samples(loaded)

        device = loaded.backbone.embeds.hidden.device.type
        seen = remembered(base, unet_dir, classifier, grid, device, draw_first) if remember else label_samples(loaded)
        point |= figures(grid, seen)
    point["error"] = denoising_error(loaded.backbone, held_out, embed)
    return point


def _measure_original(loaded: LoadedTask, held_out: LatentPool) -> Point:
    """The figures of the unedited model; a classifier that does not see in its pictures what it is asked about is not
    asked again."""
    original = measure(loaded, table(loaded.backbone, loaded.rows), held_out, None)
    seen = original["recognised"]
    if seen is not None and seen < RECOGNISED:
        loaded.task.not_evaluated = (
            f"the classifier recognises the concept in {seen:.0%} of the unedited model's pictures only"
        )
        loaded.classifier = loaded.grid = None
        original |= dict.fromkeys(CURVES)
    return original


def label_samples(loaded: LoadedTask) -> list[Label]:
    """Draw the reduced grid with the model as it is now; what is seen."""
    if loaded.classifier is None or loaded.grid is None:
        raise ValueError("no classifier knows this run")
    pipeline = loaded.pipeline.to(loaded.backbone.embeds.hidden.device)
    return loaded.classifier.look(draw_samples(pipeline, loaded.grid, loaded.task.cfg, False))


def _pictures(loaded: LoadedTask) -> tuple[LatentPool, LatentPool]:
    """The attacker's pictures, and held-out ones of the erased concept."""
    task, bar = loaded.task, loaded.bar
    prompt_table = PromptTable([], [], [*task.forbidden, *task.attacking])
    pictures = Pictures(task.cfg, loaded.backbone, prompt_table)
    number = task.settings.num_images
    bar.set_description("pictures")
    held_out = task.forbidden, number, HELD_OUT_SEED
    _more(bar, pictures.evaluations(*held_out))
    if task.captions is not None:
        device = loaded.backbone.embeds.hidden.device
        attacking = encode_images(task.captions, task.cfg, loaded.pipeline, device, "--images")
    else:
        drawn = task.attacking, number, ATTACK_SEED
        _more(bar, pictures.evaluations(*drawn))
        attacking = pictures.drawn(*drawn)
    return attacking, pictures.drawn(*held_out)


def _attacked(
    loaded: LoadedTask, folder: Path, name: str, attacking: LatentPool, held_out: LatentPool, original: Point
) -> dict:
    """The curves of one erased model: {"name", "method", "runs", "summary"}."""
    settings, unet_dir = loaded.task.settings, folder / UNET
    _load_weights(loaded.backbone.unet, unet_dir)
    loaded.bar.set_description(f"{name}, step 0")
    start = measure(loaded, table(loaded.backbone, loaded.rows), held_out, unet_dir)
    runs = []
    for seed in settings.seeds:
        points = [start, *_one_attack(loaded, attacking, held_out, seed, f"{name}, seed {seed}")]
        runs.append(_run(seed, settings.steps, points, original["recognised"]))
    method = load_config(str(folder / CONFIG), []).method
    return {"name": folder.resolve().name, "method": method, "runs": runs, "summary": _summary(runs)}


def _one_attack(
    loaded: LoadedTask, attacking: LatentPool, held_out: LatentPool, seed: int, label: str
) -> Iterator[Point]:
    """Attack once; a point after each of the steps asked for, step 0 apart."""
    task = loaded.task
    options = options_of(task)
    with edit(task.settings, loaded.backbone, loaded.rows, seed, loaded.pipeline, task.words) as change:
        losses = attack_steps(loaded.backbone, attacking, change, options, seed)
        for step in range(1, task.settings.steps[-1] + 1):
            loaded.bar.set_description(f"{label}, step {step}", refresh=False)
            try:
                check_finite(next(losses), step, options.learning_rate)
            except ArithmeticError as error:
                raise UserError(f"--attack: {task.settings.attack!r} diverged: {error}") from None
            if step in task.settings.steps:
                yield measure(loaded, change.embed, held_out, None, remember=False)


def options_of(task: Task) -> Options:
    """The attacker's optimizer."""
    settings = task.settings
    return Options(
        settings.rate(task.minicanvas), settings.batch_size, caption_dropout=settings.caption_dropout
    )  # fmt: skip


def _run(seed: int, steps: tuple[int, ...], points: list[Point], original: float | None) -> dict:
    run: dict[str, Any] = {"seed": seed}
    for name in (*CURVES, "error"):
        values = [point[name] for point in points]
        run[name] = None if values[0] is None else values
    shares = run["recognised"]
    run["steps_to_half"] = None if original is None else steps_to_half(steps, shares, original)
    run["area"] = None if original is None else area(steps, shares)
    return run


def _summary(runs: list[dict]) -> dict:
    result: dict[str, Any] = {name: summary([run[name] for run in runs]) for name in ("steps_to_half", "area")}
    for name in (*CURVES, "error"):
        result[name] = None if runs[0][name] is None else summary_at([run[name] for run in runs])
    return result


def _described(loaded: LoadedTask, pictures: int) -> dict:
    """What a reader needs to repeat or to distrust the curves."""
    task, settings = loaded.task, loaded.task.settings
    cfg, options = task.cfg, asdict(options_of(task))
    grid = None if loaded.grid is None else loaded.grid.describe()
    return {
        "attack": settings.attack,
        "data": settings.data if settings.images is None else "images",
        "images": None if settings.images is None else Path(settings.images).resolve().name,
        "pictures": pictures,
        "held_out": settings.num_images,
        "steps": list(settings.steps),
        "seeds": list(settings.seeds),
        **({"lora_rank": None} | ATTACKS[settings.attack].facts(settings)),
        "optimizer": {"name": "AdamW"} | options,
        "base": public_name(cfg.model),
        "concepts": [concept.name for concept in cfg.concepts],
        "why_not_judged": task.not_evaluated,
        "protocol": grid,
    }


def _load_weights(unet: nn.Module, folder: Path) -> None:
    try:
        unet.load_state_dict(load_unet(folder, torch.float32).state_dict())
    except RuntimeError:
        raise UserError(f"--model: {str(folder)!r} is a U-Net of another architecture than the base model's") from None


def _attack_evaluations(loaded: LoadedTask) -> int:
    """U-Net evaluations of all attacks on one erased model; a training step counts as three, as `_count` does."""
    settings = loaded.task.settings
    training = 3 * settings.batch_size * settings.steps[-1]
    measuring = (len(settings.steps) - 1) * (_drawing(loaded) + settings.num_images)
    return settings.num_images + len(settings.seeds) * (training + measuring)


def _drawing(loaded: LoadedTask) -> int:
    """U-Net evaluations of the pictures that the classifier looks at once."""
    grid = loaded.grid
    return 0 if grid is None else 2 * len(grid.samples) * grid.num_inference_steps


def _more(bar: tqdm, evaluations: int) -> None:
    """So much more is to be done."""
    bar.total = (bar.total or 0) + evaluations


def _count(bar: tqdm, samples: int) -> None:
    bar.update(samples * (3 if torch.is_grad_enabled() else 1))
