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
from fastunlearn.minicanvas.build.editions import CANVAS, Edition, FitPlan
from fastunlearn.minicanvas.build.fitting import launch
from fastunlearn.minicanvas.data import dataset
from fastunlearn.minicanvas.data.dataset import Recipe
from fastunlearn.minicanvas.judge import load_judge
from fastunlearn.models.loading import load_pipeline


@dataclasses.dataclass
class Build:
    """A folder that is being filled: with which edition, in how many CPU processes, and whether this is only a smoke
    test."""

    folder: Path
    processes: int = 2
    quick: bool = False
    edition: Edition = CANVAS

    def plan(self, name: str) -> FitPlan:
        """The plan of a stage; a smoke test takes a handful of steps."""
        plan = self.edition.plans[name]
        if not self.quick:
            return plan
        return dataclasses.replace(plan, steps=4, batch=min(plan.batch, 8), warmup=1)

    def recipe(self, name: str) -> Recipe:
        """What to render for a stage; a smoke test renders two pictures of every cell."""
        recipe = self.edition.recipes[name]
        return dataclasses.replace(recipe, count=2 * len(self.edition.cells)) if self.quick else recipe


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the build: its work, the path whose existence marks it done, and its CPU seconds where measured."""

    name: str
    run: Callable[[Build], None]
    output: str
    cpu_seconds: float
    """For MiniCanvas; others are smaller."""
    pictures: str = ""
    """The data set that it renders: an edition without it has no such stage."""


def render_pictures(build: Build, name: str) -> None:
    """Render one data set to NAME.npy and its labels to NAME_labels.npz."""
    rendered = dataset.render_all(build.recipe(name), build.processes, progress=name)
    np.savez(build.folder / f"{name}_labels.npz", objects=rendered.objects, styles=rendered.styles, worn=rendered.worn)
    partial = build.folder / f"{name}.partial.npy"
    np.save(partial, rendered.images)
    partial.replace(build.folder / f"{name}.npy")


def run_judge(build: Build) -> None:
    """Train the classifier."""
    paths = build.folder / "pictures_judge", build.folder / "judge.safetensors"
    launch(train_judge.train, (build.plan("judge"), build.edition, *paths), build.processes)


def run_vae(build: Build) -> None:
    """Train the autoencoder, or only the decoder where the edition shares an encoder."""
    pictures = build.folder / f"{build.edition.vae_pictures}.npy"
    arguments = (build.plan("vae"), pictures, build.folder / "vae", build.edition.vae)
    launch(train_vae.train, arguments, build.processes)


def run_text(build: Build) -> None:
    """Build the tokenizer and train the text encoders; so small that one process is the quickest."""
    launch(train_text.train, (build.plan("text"), build.edition, build.folder), 1)


def run_material(build: Build) -> None:
    """Encode the pictures and captions of the U-Net."""
    train_unet.prepare(build.folder, build.edition, build.processes)


def run_unet(build: Build) -> None:
    """Train the U-Net."""
    launch(train_unet.train, (build.plan("unet"), build.edition, build.folder), build.processes)


def run_assemble(build: Build) -> None:
    """Write the finished pipeline folder."""
    assemble.write_pipeline(assemble.make_pipeline(build.folder, edition=build.edition), build.folder / "model")


def run_check(build: Build) -> None:
    """Draw and read the whole grid with every seed, measure the autoencoder, and write `check.json` and a picture."""
    report = check(build.folder, build.edition, build.quick)
    partial = build.folder / "check.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(build.folder / "check.json")


STAGES = (
    Stage(
        "pictures for the autoencoder",
        lambda b: render_pictures(b, "pictures_vae"),
        "pictures_vae.npy",
        60,
        "pictures_vae",
    ),
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
    stages = [stage for stage in STAGES if stage.pictures in ("", *build.edition.recipes)]
    left = [stage for stage in stages if not (build.folder / stage.output).exists()]
    say(estimate(build, left))
    for stage in left:
        say(f"stage {stages.index(stage) + 1} of {len(stages)}: {stage.name}")
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


def check(folder: Path, edition: Edition, quick: bool = False) -> dict[str, Any]:
    """Measure the finished model of a folder: accuracy on the drawn grid, the other wordings of the attribute, the
    judge on held-out drawings, the autoencoder's PSNR."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_pipeline(folder / "model").to(device)
    judge = load_judge(device, folder / "judge.safetensors")
    steps, seeds = 2 if quick else drawing.STEPS, list(range(1 if quick else edition.check_seeds))
    reading, images = drawing.read_grid(pipe, judge, edition.cells, seeds, steps, "check", edition)
    drawing.save_grid(images[: len(edition.cells)], folder / "grid.png", len(edition.collection.looks))
    kinds = drawing.KINDS[: reading.read.shape[1]]
    count = 80 if quick else 1600
    sets, held = edition.collection.generator_sets, edition.collection.held_out_sets

    def rendered(size: int, seed: int, names: tuple[str, ...]) -> dataset.Pictures:
        return dataset.render_all(Recipe(size, seed, names, collection=edition.collection))

    held_out = {name: rendered(count, 99, (name,)) for name in held}
    return {
        "images": len(images),
        "sampler": f"DDIM, {steps} steps, guidance {drawing.GUIDANCE}",
        **{kind: round(reading.share(i), 4) for i, kind in enumerate(kinds)},
        **{f"per_{kind}": reading.per_class(i) for i, kind in enumerate(kinds)},
        **drawing.read_wordings(pipe, judge, edition, 7000, steps),
        "judge_held_out": {name: train_judge.accuracy(judge, p) for name, p in held_out.items()},
        "judge_seen": train_judge.accuracy(judge, rendered(count, 98, sets)),
        "psnr_db": psnr(pipe.vae, rendered(count // 4, 97, sets), edition),
        "psnr_held_out_db": {name: psnr(pipe.vae, p, edition) for name, p in held_out.items()},
    }


def psnr(vae: AutoencoderKL, rendered: dataset.Pictures, edition: Edition) -> dict[str, float]:
    """Mean reconstruction PSNR in dB over all pictures, and for each style."""
    values = train_vae.reconstruction_psnr(vae, train_vae.to_model_range(rendered.images)).numpy()
    styles = {name: values[rendered.styles == i] for i, name in enumerate(edition.collection.styles)}
    return {"mean": round(float(values.mean()), 2)} | {n: round(float(v.mean()), 2) for n, v in styles.items()}


def _note_seconds(folder: Path, stage: str, seconds: float) -> None:
    path = folder / "seconds.json"
    seen = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(seen | {stage: round(seconds, 1)}, indent=2) + "\n")
