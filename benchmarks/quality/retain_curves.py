"""What gradient surgery does to the retain loss over updates, with and without it.

`train.py` once per variant, alike in everything else, and one picture and table of their retain losses. "measured only"
keeps nothing and projects nothing (`surgery.strength 0`): the retain loss of plain KSCU. No pictures are evaluated here
(`minicanvas_quality.py` does that).

    python benchmarks/quality/retain_curves.py --output output/curves --picture output/curves/retain_loss.png
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

from markdown_table import markdown_table  # noqa: E402

VARIANTS = {
    "measured only": ["--surgery.strength", "0"],
    "projection": [],
    "rho 1": ["--surgery.rho", "1", "--surgery.projection", "none"],
    "projection and rho 1": ["--surgery.rho", "1"],
}
SMOOTHED = 40  # updates in the running mean: one key step's noise level differs much from the next one's


def run_variant(folder: Path, options: list[str]) -> list[dict]:
    """The log of a finished run, which is started first if there is none."""
    if not (folder / "metrics.json").is_file():
        command = [sys.executable, str(ROOT / "fastunlearn" / "train.py"), "--surgery.enabled", "true", *options]
        command += ["--output_dir", str(folder), "--overwrite_output_dir", "true", "--evaluation.mode", "off"]
        subprocess.run(command, check=True, cwd=ROOT)
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]


def draw(curves: dict[str, np.ndarray], picture: Path) -> None:
    """Running means, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, losses in curves.items():
        smooth = np.convolve(losses, np.ones(SMOOTHED) / SMOOTHED, mode="valid")
        axes.plot(np.arange(len(smooth)) + SMOOTHED, smooth, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("update")
    axes.set_ylabel(f"retain loss, mean of {SMOOTHED} updates")
    axes.legend()
    figure.savefig(picture, dpi=110)


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it goes to every training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/curves"))
    parser.add_argument("--config", default=str(ROOT / "configs" / "minicanvas_style.toml"))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path, help="also write the table's rows here")
    return parser.parse_known_args()


def main() -> None:
    """Run what is missing, draw, and print the table."""
    args, extra = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    logs = {
        name: run_variant(args.output / name.replace(" ", "_"), ["--config", args.config, *options, *extra])
        for name, options in VARIANTS.items()
    }
    rows: list[dict[str, Any]] = []
    for name, log in logs.items():
        losses, cosines = ([entry[field] for entry in log] for field in ("retain_loss", "cosine"))
        half = len(log) // 2
        row = {"variant": name, "updates": len(log), "retain_loss": float(np.mean(losses))}
        row |= {"second_half": float(np.mean(losses[half:])), "cosine": float(np.mean(cosines))}
        rows.append(row | {"conflicting_share": float(np.mean([entry["projected_share"] for entry in log]))})
    draw({name: np.array([entry["retain_loss"] for entry in log]) for name, log in logs.items()},
         args.picture or args.output / "retain_loss.png")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    titles = ["", "updates", "mean retain loss", "second half", "mean cosine", "conflicting tensors"]
    print(markdown_table(titles, [
        [row["variant"], str(row["updates"]), f"{row['retain_loss']:.2e}", f"{row['second_half']:.2e}",
         f"{row['cosine']:+.3f}", f"{row['conflicting_share']:.0%}"] for row in rows
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
