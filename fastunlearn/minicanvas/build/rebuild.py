"""`fastunlearn minicanvas rebuild`: every stage from the drawings to the finished pipeline folder, in order.

Each stage reads what the stages before it left in the folder and writes one file or folder of its own; a stage whose
output exists is skipped, and an interrupted one goes on from its checkpoint. The work itself is in `dataset.py`,
`train_*.py` and `assemble.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from fastunlearn.minicanvas.build import assemble, drawing, train_judge, train_text, train_unet, train_vae
from fastunlearn.minicanvas.build.fitting import FitPlan, launch
from fastunlearn.minicanvas.data import dataset, pictures
from fastunlearn.minicanvas.data.dataset import Recipe
from fastunlearn.minicanvas.judge import load_judge
from fastunlearn.models.loading import load_pipeline

RECIPES = {
    "pictures_vae": Recipe(count=12_000, seed=1, others=0.35),
    "pictures_judge": Recipe(count=24_000, seed=2, sets=pictures.JUDGE_SETS, others=0.18, wide=True),
    "pictures_unet": Recipe(count=32_000, seed=3),
}
CHECK_SEEDS = tuple(range(10))  # with 80 cells: 800 pictures


@dataclasses.dataclass
class Build:
    """A folder that is being filled, with the number of CPU processes and whether this is only a smoke test."""

    folder: Path
    processes: int = 2
    quick: bool = False

    def plan(self, plan: FitPlan) -> FitPlan:
        """The plan of a stage; a smoke test takes a handful of steps."""
        if not self.quick:
            return plan
        return dataclasses.replace(plan, steps=4, batch=min(plan.batch, 8), warmup=1)

    def recipe(self, name: str) -> Recipe:
        """What to render for a stage; a smoke test renders two pictures of every cell."""
        recipe = RECIPES[name]
        return dataclasses.replace(recipe, count=160) if self.quick else recipe


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the build: its work, the path whose existence marks it done, and its CPU seconds where measured."""

    name: str
    run: Callable[[Build], None]
    output: str
    cpu_seconds: float


def render_pictures(build: Build, name: str) -> None:
    """Render one data set to NAME.npy and its labels to NAME_labels.npz."""
    rendered = dataset.render_all(build.recipe(name), build.processes, progress=name)
    np.savez(build.folder / f"{name}_labels.npz", objects=rendered.objects, styles=rendered.styles)
    partial = build.folder / f"{name}.partial.npy"
    np.save(partial, rendered.images)
    partial.replace(build.folder / f"{name}.npy")


def run_judge(build: Build) -> None:
    """Train the classifier."""
    arguments = (build.plan(train_judge.PLAN), build.folder / "pictures_judge", build.folder / "judge.safetensors")
    launch(train_judge.train, arguments, build.processes)


def run_vae(build: Build) -> None:
    """Train the autoencoder."""
    arguments = (build.plan(train_vae.PLAN), build.folder / "pictures_vae.npy", build.folder / "vae")
    launch(train_vae.train, arguments, build.processes)


def run_text(build: Build) -> None:
    """Build the tokenizer and train the text encoders; so small that one process is the quickest."""
    launch(train_text.train, (build.plan(train_text.PLAN), build.folder), 1)


def run_material(build: Build) -> None:
    """Encode the pictures and captions of the U-Net."""
    train_unet.prepare(build.folder, build.processes, train_unet.PLAN.seed)


def run_unet(build: Build) -> None:
    """Train the U-Net."""
    launch(train_unet.train, (build.plan(train_unet.PLAN), build.folder), build.processes)


def run_assemble(build: Build) -> None:
    """Write the finished pipeline folder."""
    assemble.write_pipeline(assemble.make_pipeline(build.folder), build.folder / "model")


def run_check(build: Build) -> None:
    """Draw and read the whole grid with every seed, measure the autoencoder, and write `check.json` and a picture."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = check(build.folder / "model", build.folder / "judge.safetensors", device, build.quick, build.folder)
    partial = build.folder / "check.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(build.folder / "check.json")


STAGES = (
    Stage("pictures for the autoencoder", lambda b: render_pictures(b, "pictures_vae"), "pictures_vae.npy", 60),
    Stage("pictures for the judge", lambda b: render_pictures(b, "pictures_judge"), "pictures_judge.npy", 140),
    Stage("pictures for the U-Net", lambda b: render_pictures(b, "pictures_unet"), "pictures_unet.npy", 150),
    Stage("judge", run_judge, "judge.safetensors", 480),
    Stage("autoencoder", run_vae, "vae", 1400),
    Stage("text encoders", run_text, "text_encoder_2", 60),
    Stage("latents and caption states", run_material, "unet_material.pt", 220),
    Stage("U-Net", run_unet, "unet", 4000),
    Stage("pipeline", run_assemble, "model", 5),
    Stage("check", run_check, "check.json", 240),
)


def rebuild(build: Build, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run every stage that is not done yet and give back the report of the last one.

    `say` gets one line before the work (how long it will take) and one per stage.
    """
    build.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    left = [stage for stage in STAGES if not (build.folder / stage.output).exists()]
    say(estimate(build, left))
    for stage in left:
        say(f"stage {STAGES.index(stage) + 1} of {len(STAGES)}: {stage.name}")
        started = time.monotonic()
        stage.run(build)
        _note_seconds(build.folder, stage.name, time.monotonic() - started)
    return json.loads((build.folder / "check.json").read_text())


def estimate(build: Build, stages: list[Stage]) -> str:
    """How long the stages will take, from what they took when the shipped weights were made."""
    if build.quick:
        return "a smoke test of every stage: about two minutes; the model will draw noise"
    if torch.cuda.is_available():
        return (
            f"{len(stages)} stages on the GPU: not measured yet; about 55 minutes on two CPU cores, so less than that"
        )
    minutes = sum(stage.cpu_seconds for stage in stages) / build.processes / 60
    return (
        f"{len(stages)} stages in {build.processes} processes: about {minutes:.0f} minutes if each has a core to itself"
        " (from a Xeon with AMX; older cores take two to three times as long)"
    )


def check(
    model: Path, judge_weights: Path, device: str = "cpu", quick: bool = False, pictures_to: Path | None = None
) -> dict[str, Any]:
    """Measure a finished model: accuracy on the drawn grid, the judge on held-out drawings, the autoencoder's PSNR."""
    pipe = load_pipeline(model).to(device)
    judge = load_judge(device, judge_weights)
    cells = drawing.grid_cells()
    steps = 2 if quick else drawing.STEPS
    seeds = list(CHECK_SEEDS[: 1 if quick else None])
    reading, images = drawing.read_grid(pipe, judge, cells, seeds, steps=steps, progress="check")
    if pictures_to is not None:
        drawing.save_grid(images[: len(cells)], pictures_to / "grid.png", len(dataset.OBJECTS))
    count = 80 if quick else 1600
    held_out = {name: dataset.render_all(Recipe(count, 99, (name,))) for name in pictures.HELD_OUT_SETS}
    return {
        "images": len(images),
        "sampler": f"DDIM, {steps} steps, guidance {drawing.GUIDANCE}",
        "object": round(reading.share(0), 4),
        "style": round(reading.share(1), 4),
        "per_object": reading.per_class(0),
        "per_style": reading.per_class(1),
        "judge_held_out": {
            name: train_judge.accuracy(judge, p.images, p.objects, p.styles) for name, p in held_out.items()
        },
        "judge_seen": train_judge.accuracy(judge, *_fields(dataset.render_all(Recipe(count, 98)))),
        "psnr_db": psnr(pipe.vae, dataset.render_all(Recipe(count // 4, 97))),
        "psnr_held_out_db": {name: psnr(pipe.vae, p) for name, p in held_out.items()},
    }


def psnr(vae: AutoencoderKL, rendered: dataset.Pictures) -> dict[str, float]:
    """Mean reconstruction PSNR in dB over all pictures, and for each style."""
    values = train_vae.reconstruction_psnr(vae, train_vae.to_model_range(rendered.images)).numpy()
    styles = {name: values[rendered.styles == i] for i, name in enumerate(dataset.STYLES)}
    return {"mean": round(float(values.mean()), 2)} | {n: round(float(v.mean()), 2) for n, v in styles.items()}


def _fields(rendered: dataset.Pictures) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return rendered.images, rendered.objects, rendered.styles


def _note_seconds(folder: Path, stage: str, seconds: float) -> None:
    path = folder / "seconds.json"
    seen = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(seen | {stage: round(seconds, 1)}, indent=2) + "\n")
