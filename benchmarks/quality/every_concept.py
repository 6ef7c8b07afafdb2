"""Every concept of the embedded model, erased with nothing given but its name: scores, updates, U-Net evaluations.

`fastunlearn train --model.pretrained_model_name_or_path FOLDER --concepts NAME` once per concept and seed. By its
folder the model is one like any other: what it knows, and so what is kept, a run has to find out itself. Then the
pictures of the whole protocol are drawn with the edited model, and its classifier looks. Finished runs are kept in the
output folder, so it can be interrupted and started again.

    python benchmarks/quality/every_concept.py --output outputs/every --jobs 2 --rows rows.json
    python benchmarks/quality/every_concept.py --model second --output outputs/second --jobs 2 --rows second.json
    python benchmarks/quality/every_concept.py --show rows.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import second_model  # noqa: E402
from markdown_table import markdown_table  # noqa: E402
from quality import second_model_scores  # noqa: E402

SETTINGS = {"default": (), "no retain gradient": ("--surgery.enabled", "false")}
SCORES = ("UA", "IRA", "CRA", "CRA_target", "UA_paraphrase", "UA_synonym")
QUICKLY = ("--evaluation.mode", "off", "--report.num_validation_seeds", "1", "--evaluation.num_inference_steps", "2")


def names(model: str, kind: str) -> list[str]:
    """A model's concepts of a kind, as a user writes them."""
    if model == "second":
        return second_model_scores.concepts(kind)
    from fastunlearn.minicanvas.vocabulary import OBJECTS, STYLES

    return [f"{style} style" for style in STYLES] if kind == "style" else list(OBJECTS)


def folder_of(model: str) -> str:
    """Of its pipeline."""
    from fastunlearn.models.loading import resolve_model

    return str(second_model.path()) if model == "second" else resolve_model("minicanvas")


def run(model: str, job: tuple[str, str, int], output: Path, extra: Sequence[str]) -> dict[str, Any]:
    """The row of (setting, concept, seed), from its file if it is there."""
    setting, concept, seed = job
    folder = output / f"{setting}-{concept}-{seed}".replace(" ", "_")
    row_file = folder.with_suffix(".json")
    if not row_file.is_file():
        train(model, job, folder, extra)
        command = [sys.executable, __file__, "--model", model, "--measure", str(folder)]
        with row_file.with_suffix(".part").open("w") as part:
            subprocess.run(command, stdout=part, check=True)
        row_file.with_suffix(".part").rename(row_file)
    return {"setting": setting, "concept": concept, "seed": seed} | json.loads(row_file.read_text())


def train(model: str, job: tuple[str, str, int], folder: Path, extra: Sequence[str]) -> None:
    """As a user would; a run that does not erase ends with status 3, and counts."""
    setting, concept, seed = job
    command = [sys.executable, str(ROOT / "fastunlearn" / "train.py"), "--concepts", concept, "--seed", str(seed)]
    command += ["--model.pretrained_model_name_or_path", folder_of(model), "--output_dir", str(folder)]
    command += ["--overwrite_output_dir", "true", "--train.cpu_threads", "1", *QUICKLY, *SETTINGS[setting], *extra]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, cwd=ROOT)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{concept}: see {folder.with_suffix('.log')}")


def measure(model: str, folder: Path) -> dict[str, Any]:
    """What a finished run took, and its scores."""
    metrics = json.loads((folder / "metrics.json").read_text())
    progress = metrics["progress"]
    taken = {"updates": metrics["updates"], "unet_evaluations": metrics["unet_evaluations"]["total"]}
    taken |= {"probe_evaluations": metrics["unet_evaluations"]["probe"], "drift": progress["drift"]}
    scores = second_model_scores.measure(folder) if model == "second" else whole_protocol(folder)
    return taken | {"erased": progress["erased"]} | scores


def whole_protocol(folder: Path) -> dict[str, Any]:
    """MiniCanvas's own."""
    import torch

    from fastunlearn.config import load_config
    from fastunlearn.evaluation.classifiers.base import choose_classifier
    from fastunlearn.evaluation.evaluate import draw_samples
    from fastunlearn.evaluation.metrics.scores import score
    from fastunlearn.models.loading import load_pipeline
    from fastunlearn.schema.sections import EvaluationConfig

    torch.set_num_threads(1)
    cfg = load_config(str(folder / "config.toml"), []).model_copy(update={"evaluation": EvaluationConfig()})
    classifier = choose_classifier(cfg)
    grid = classifier.grid(cfg)
    edited = load_pipeline(cfg.model.pretrained_model_name_or_path, unet_path=folder / "unet")
    labels = classifier.load("cpu").look(draw_samples(edited, grid, cfg, False))
    scores = score(list(zip(grid.samples, labels, strict=True)), grid.concepts, cfg.evaluation.metrics, None)
    return {name: scores[name] for name in SCORES}


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: for each setting and kind a line per concept, the mean over its seeds, and one for all."""
    rows = list(rows)
    shown = [name for name in (*SCORES, *(f"{score}_before" for score in SCORES[1:4])) if any(name in r for r in rows)]
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        kind = "style" if row["concept"].endswith(" style") else "object"
        groups.setdefault((row["setting"], kind), {}).setdefault(row["concept"], []).append(row)
    lines = []
    for (setting, kind), concepts in groups.items():
        lines += [[setting, concept, *_cells(runs, shown)] for concept, runs in concepts.items()]
        every = [row for runs in concepts.values() for row in runs]
        lines.append([setting, f"**{kind}s, mean of {len(every)}**", *_cells(every, shown)])
    return markdown_table(["setting", "erased", "updates", "U-Net evaluations", *shown, "lowest UA"], lines)


def _cells(rows: Sequence[dict[str, Any]], shown: Sequence[str]) -> list[str]:
    counts = [f"{mean(row[name] for row in rows):.0f}" for name in ("updates", "unet_evaluations")]
    found = [[row[name] for row in rows if row.get(name) is not None] for name in shown]
    return [*counts, *(f"{mean(values):.3f}" if values else "" for values in found), f"{min(found[0]):.3f}"]


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it goes to every training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/every"))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--model", choices=("minicanvas", "second"), default="minicanvas")
    parser.add_argument("--styles", nargs="*", help="none given: all")
    parser.add_argument("--objects", nargs="*", help="none given: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; one core each")
    parser.add_argument("--rows", type=Path, help="also write the rows to this JSON file")
    parser.add_argument("--show", nargs="+", type=Path, help="run nothing: the table of the rows in these files")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return parser.parse_known_args()


def main() -> None:
    """Run what is missing and print the table."""
    args, extra = arguments()
    if args.measure:
        print(json.dumps(measure(args.model, args.measure)))
        return
    if args.show:
        print(table(row for file in args.show for row in json.loads(file.read_text())))
        return
    styles = names(args.model, "style") if args.styles is None else args.styles
    objects = names(args.model, "object") if args.objects is None else args.objects
    jobs = [
        (setting, concept, seed) for seed in args.seeds for setting in args.settings for concept in (*styles, *objects)
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(lambda job: run(args.model, job, args.output, extra), jobs)
        rows = list(tqdm(done, total=len(jobs), unit="run"))
    if args.rows:
        args.rows.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
