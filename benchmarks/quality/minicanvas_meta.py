"""How hard an erased concept is to teach again: every base method with and without the meta term, attacked alike.

`train.py` once per (method, concept), then `fastunlearn relearn` once per attack, each as a user would start it; one
row per run and attack, a table and a picture of the curves. Finished parts are kept in the output folder, so it can be
interrupted and started again. Kept concepts and sampler are those of the run's own evaluation.

    python benchmarks/quality/minicanvas_meta.py --output output/meta --jobs 2
    python benchmarks/quality/minicanvas_meta.py --output output/meta --methods kscu --attacks lora benign --jobs 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastunlearn.evaluation.relearning.plot import step_axis
from fastunlearn.minicanvas.data.dataset import render
from fastunlearn.minicanvas.data.pictures import GENERATOR_SETS, load_objects
from fastunlearn.minicanvas.data.styles import STYLE_FUNCTIONS
from fastunlearn.minicanvas.vocabulary import OBJECTS, STYLES, normalise_concept

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from markdown_table import markdown_table  # noqa: E402
from quality.minicanvas_quality import BASE_METHODS, METHODS, ROOT, Job, run_job  # noqa: E402

CONCEPTS = {"style": ("neon style", "ink style"), "object": ("cat", "car")}
ATTACKS = {
    "full": [],
    "attn": ["--attack", "attn"],
    "lora": ["--attack", "lora"],
    "related": ["--data", "related"],
    "benign": ["--data", "benign"],
    # Pictures that no model has drawn, and twice the learning rate of the others.
    "rendered": ["--learning_rate", "2e-4"],
}
CAPTIONS = ("a {thing} image in {style} style", "{thing}, {style} style", "an image of a {thing} in {style} style")
SCORES = ("UA", "IRA", "CRA")
# What of it does the work: one option changed each.
VARIANTS = [method for method in METHODS if method.startswith(("kscu+meta:", "kscu: the same", "kscu: further"))]


def attacked(job: Job, output: Path, attack: str, how: Sequence[str], extra: Sequence[str]) -> dict[str, Any]:
    """Train and attack unless it is done, and return the row. ``how``: options of ``relearn``."""
    before, folder = run_job(job, output, extra), output / job.name
    result = folder / f"relearn-{attack}.json"
    if not result.is_file():
        command = [sys.executable, "-m", "fastunlearn.cli", "relearn", "--model", str(folder), "--json"]
        command += ["--sampler_steps", "12", *how, *ATTACKS[attack]]
        if attack == "rendered":
            command += ["--images", str(rendered(job.concept, output / f"{job.name}-rendered"))]
        with (output / f"{job.name}-{attack}.log").open("w") as log:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, check=True, cwd=ROOT, text=True)
        result.write_text(done.stdout)
    curve = json.loads(result.read_text())
    runs, summary = curve["runs"], curve["summary"]
    row = {name: before[name] for name in ("method", "kind", "concept", "seed", "updates", "unet_evaluations")}
    row |= {"attack": attack, "before": {name: before[name] for name in SCORES}, "original": curve["original"]}
    row |= {"steps": curve["steps"], "attack_seeds": curve["seeds"], "area": summary["area"]}
    row |= {"steps_to_half": [run["steps_to_half"] for run in runs]}
    return row | {name: summary[name] for name in ("recognised", "IRA", "CRA")}


def rendered(concept: str, folder: Path, count: int = 48, seed: int = 987) -> Path:
    """A folder of pictures of the concept from MiniCanvas's data set, with captions, and not from the model."""
    word, rng = normalise_concept(concept), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        drawings = load_objects(rng.choice(GENERATOR_SETS))
        thing = word if word in OBJECTS else OBJECTS[number % len(OBJECTS)]
        style = word if word in STYLES else STYLES[number % len(STYLES)]
        picture = render(drawings[OBJECTS.index(thing)], STYLE_FUNCTIONS[style], rng)
        Image.fromarray(picture).save(folder / f"{number:03}.png")
        caption = CAPTIONS[number % len(CAPTIONS)].format(thing=thing, style=style)
        lines.append(json.dumps({"file_name": f"{number:03}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def half(row: dict[str, Any]) -> str:
    """Mean of the seeds; where one never got there it is a lower bound."""
    found = [row["steps"][-1] if value is None else value for value in row["steps_to_half"]]
    return f"{'>' if None in row['steps_to_half'] else ''}{sum(found) / len(found):.0f}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, one line per row; recognised: mean and standard deviation over the attack's seeds."""
    steps = rows[0]["steps"]
    heads = ["method", "concept", "attack", *SCORES, *(f"after {n}" for n in steps), "steps to half", "area"]
    body = []
    for row in sorted(rows, key=lambda row: (row["attack"], row["kind"], row["concept"], row["method"])):
        shares = zip(row["recognised"]["mean"], row["recognised"]["spread"], strict=True)
        cells = [row["method"], row["concept"], row["attack"], *(f"{row['before'][name]:.3f}" for name in SCORES)]
        cells += [f"{mean:.2f} ± {spread or 0:.2f}" for mean, spread in shares]
        body.append([*cells, half(row), f"{row['area']['mean']:.2f}"])
    return markdown_table(heads, body)


def pairs(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, one line per method, concept and attack that has a row without and one with the term."""
    steps = rows[0]["steps"]
    heads = ["method", "concept", "attack", *SCORES, *(f"after {n}" for n in steps if n), "steps to half"]
    body = []
    found = {(row["attack"], row["kind"], row["concept"], row["method"]): row for row in rows}
    for (attack, kind, concept, method), base in sorted(found.items()):
        meta = found.get((attack, kind, concept, f"{method}+meta"))
        if meta is None:
            continue
        cells = [f"{base['before'][name]:.3f} → {meta['before'][name]:.3f}" for name in SCORES]
        shares = zip(steps, base["recognised"]["mean"], meta["recognised"]["mean"], strict=True)
        cells += [f"{without:.2f} → {with_it:.2f}" for step, without, with_it in shares if step]
        body.append([method, concept, attack, *cells, f"{half(base)} → {half(meta)}"])
    return markdown_table(heads, body)


def draw(rows: Sequence[dict[str, Any]], picture: Path) -> None:
    """One panel per concept: dashed without the term, solid with it."""
    from matplotlib.figure import Figure

    concepts = sorted({(row["kind"], row["concept"]) for row in rows}, reverse=True)
    methods = sorted({row["method"].partition("+meta")[0] for row in rows})
    figure = Figure(figsize=(4 * len(concepts), 3.6), layout="constrained")
    panels = figure.subplots(1, len(concepts), squeeze=False, sharey=True)[0]
    for axes, (_, concept) in zip(panels, concepts, strict=True):
        for row in (row for row in rows if row["concept"] == concept):
            base, meta, _ = row["method"].partition("+meta")
            axes.errorbar(
                row["steps"], row["recognised"]["mean"], yerr=row["recognised"]["spread"], capsize=2,
                color=f"C{methods.index(base)}", linestyle="-" if meta else "--", label=row["method"],
            )  # fmt: skip
        axes.set(title=concept, ylim=(-0.03, 1.03))
        step_axis(axes, rows[0]["steps"])
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("erased concept recognised")
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = sorted(handles)
    figure.legend([handles[name] for name in names], names, loc="outside right upper", fontsize=8)
    figure.savefig(picture, dpi=110)


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it goes to every training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/meta"))
    parser.add_argument("--methods", nargs="+", default=BASE_METHODS, choices=[*BASE_METHODS, *VARIANTS])
    parser.add_argument("--styles", nargs="*", default=list(CONCEPTS["style"]))
    parser.add_argument("--objects", nargs="*", default=list(CONCEPTS["object"]))
    parser.add_argument("--seed", type=int, default=42, help="of the training")
    parser.add_argument("--attacks", nargs="+", default=["full"], choices=list(ATTACKS))
    parser.add_argument("--attack_seeds", default="3", help="number of seeds, or a list such as 4,7")
    parser.add_argument("--attack_steps", default="0,10,50,100,300", help="when to measure")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; one core each")
    parser.add_argument("--rows", type=Path, help="also write the rows to this JSON file")
    parser.add_argument("--picture", type=Path, help="also draw the curves of the first attack here")
    parser.add_argument("--pairs", action="store_true", help="print without → with the term, in one line")
    parser.add_argument("--show", nargs="+", type=Path, help="run nothing: the rows in these files")
    return parser.parse_known_args()


def main() -> None:
    """Run what is missing, print the table and draw the curves of the first attack."""
    args, extra = arguments()
    if args.show:
        rows = [row for file in args.show for row in json.loads(file.read_text())]
    else:
        rows = measured(args, extra)
    if args.rows:
        args.rows.write_text(json.dumps(rows, indent=1) + "\n")
    if args.picture:
        draw([row for row in rows if row["attack"] == rows[0]["attack"]], args.picture)
    print(pairs(rows) if args.pairs else table(rows))


def measured(args: argparse.Namespace, extra: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of all that was asked for."""
    jobs = [
        Job(variant, kind, concept, args.seed, None)
        for kind, concepts in (("style", args.styles), ("object", args.objects))
        for concept in concepts
        for method in args.methods
        for variant in ([method] if method in VARIANTS else [method, f"{method}+meta"])
    ]
    args.output.mkdir(parents=True, exist_ok=True)

    how = ["--seeds", args.attack_seeds, "--steps", args.attack_steps]

    def rows_of(job: Job) -> list[dict[str, Any]]:
        return [attacked(job, args.output, attack, how, extra) for attack in args.attacks]

    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(tqdm(pool.map(rows_of, jobs), total=len(jobs), unit="run"))
    return [row for rows in found for row in rows]


if __name__ == "__main__":
    main()
