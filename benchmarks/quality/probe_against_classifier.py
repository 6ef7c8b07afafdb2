"""How well a run's own probe says what a classifier sees: both at the same moments of a run that nothing stops.

At every probe MiniCanvas's classifier looks at pictures that ask for the concept, in prompts and from noise that
neither training nor the probe has. A row holds what the probe saw (how far each picture has moved) and the share that
is not recognised any more; the rank correlation of the two, and the scatter, follow from the rows.

    python benchmarks/quality/probe_against_classifier.py --output outputs/probe --rows rows.json --plot scatter.png
    python benchmarks/quality/probe_against_classifier.py --show rows.json --plot scatter.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

from markdown_table import markdown_table  # noqa: E402

CONCEPTS = ("neon style", "ink style", "pixel style", "cat", "tree", "apple")
STATISTICS = {
    "share moved by more than 0.8": lambda moved: float(np.mean(np.array(moved) > 0.8)),
    "lowest fifth": lambda moved: float(np.quantile(moved, 0.2)),
    "mean": lambda moved: float(np.mean(moved)),
}


class Look:
    """Stands where a run saves its checkpoints, and lets the classifier look whenever the run has just been probed."""

    def __init__(self, run: Any, concept: str) -> None:
        from fastunlearn.evaluation.classifiers.base import choose_classifier
        from fastunlearn.models.loading import load_pipeline

        chosen = choose_classifier(run.cfg)
        self.pipe, self.classifier = load_pipeline("minicanvas"), chosen.load("cpu")
        grid = chosen.grid(run.cfg, quick=True)
        self.grid = replace(grid, samples=tuple(s for s in grid.samples if s.concept is not None))
        self.cfg, self.concept = run.cfg, concept
        self.rows: list[dict[str, Any]] = []

    def after_update(self, run: Any, recorder: Any) -> None:
        """A row, if a probe has just been made."""
        from fastunlearn.evaluation.evaluate import draw_samples
        from fastunlearn.evaluation.metrics.base import is_forgotten

        reading = run.watch.progress.readings[-1] if run.watch.progress.readings else None
        if reading is None or reading.update != run.position.update or reading.update < 16:
            return
        weights = {name: tensor.float() for name, tensor in run.export_weights().trained.items()}
        self.pipe.unet.load_state_dict(weights, strict=False)
        labels = self.classifier.look(draw_samples(self.pipe, self.grid, self.cfg, False))
        gone = [is_forgotten(sample, label) for sample, label in zip(self.grid.samples, labels, strict=True)]
        row = {"concept": self.concept, "seed": self.cfg.seed, "update": reading.update}
        self.rows.append(row | {"moved": list(reading.moved[0]), "gone": float(np.mean(gone)), "pictures": len(gone)})


def rows_of(concept: str, seed: int, updates: int, output: Path, extra: Sequence[str]) -> list[dict[str, Any]]:
    """One run, with a row for each probe from the sixteenth update on."""
    from fastunlearn.config import load_config
    from fastunlearn.training.setup import prepare
    from fastunlearn.training.trainer import update_loop
    from fastunlearn.utils.distributed import init_distributed

    given = ["--concepts", concept, "--seed", str(seed), "--train.max_train_steps", str(updates), *extra]
    given += ["--progress.stop", "false", "--train.cpu_threads", "1", "--report.report_to", "none"]
    # Whole probes, also where a glance would do: a limit on the drift has to be watched.
    given += ["--progress.max_drift", "1e9", "--output_dir", str(output / concept.replace(" ", "_"))]
    cfg = load_config(None, given)
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
    run = prepare(cfg, init_distributed())
    look: Any = Look(run, concept)
    update_loop(run, look)
    return look.rows


def ranks(values: Sequence[float]) -> np.ndarray:
    """Of equal values the mean of their places."""
    found = np.array(values)
    return np.array([((found < value).sum() + (found <= value).sum()) / 2 for value in values])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: each statistic's rank correlation (Spearman) with the share that is not recognised any more."""
    gone = ranks([row["gone"] for row in rows])
    lines = []
    for name, statistic in STATISTICS.items():
        found = [statistic(row["moved"]) for row in rows]
        lines.append([name, str(len(rows)), f"{np.corrcoef(ranks(found), gone)[0, 1]:.3f}"])
    return markdown_table(["statistic of the probe", "probes", "rank correlation"], lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The scatter: how far the lowest fifth has moved, against what the classifier does not see any more."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for concept in dict.fromkeys(row["concept"] for row in rows):
        mine = [row for row in rows if row["concept"] == concept]
        low = [STATISTICS["lowest fifth"](row["moved"]) for row in mine]
        axes.scatter(low, [row["gone"] for row in mine], s=18, label=concept)
    axes.axvline(0.95, color="grey", linewidth=0.7)
    axes.set_xlabel("moved by the lowest fifth of the probe")
    axes.set_ylabel("not recognised any more")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/probe"))
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--updates", type=int, default=192)
    parser.add_argument("--rows", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--plot", type=Path, help="write the scatter to this PNG file")
    parser.add_argument("--show", nargs="+", type=Path, help="run nothing: the rows in these files")
    args, extra = parser.parse_known_args()
    if args.show:
        rows = [row for file in args.show for row in json.loads(file.read_text())]
    else:
        from fastunlearn.utils.environment import prepare_environment

        prepare_environment()
        rows = []
        for concept in tqdm(args.concepts, unit="run"):
            rows += rows_of(concept, args.seed, args.updates, args.output, extra)
            if args.rows:
                args.rows.write_text(json.dumps(rows) + "\n")
    if args.plot:
        draw(rows, args.plot)
    print(table(rows))


if __name__ == "__main__":
    main()
