"""The quality tables: erase concepts from MiniCanvas with several methods and seeds, and measure them all.

`train.py` once per (method, concept, seed), each as a user would start it with the shipped configuration of its
concept's kind, and one row of figures per run. Finished runs are kept in the output folder, so it can be interrupted
and started again.

    python benchmarks/quality/minicanvas_quality.py --output outputs/quality --jobs 2
    python benchmarks/quality/minicanvas_quality.py --output outputs/quality --methods base    # one row each
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import harmonic_mean, mean

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

from markdown_table import markdown_table  # noqa: E402

CONCEPTS = {"style": ("neon style", "ink style", "popart style"), "object": ("cat", "car", "tree")}
SCORES = ("UA", "IRA", "CRA", "CRA_target", "UA_paraphrase", "UA_synonym")
# Overrides on top of the shipped configuration. ESD-x trains the cross-attentions on the same prompts. "+retain" adds
# the retain gradient as it is, "+surgery" takes out of the unlearning gradient what points against it as well.
RETAIN = ["--surgery.enabled", "true", "--surgery.rho", "1.0"]
ESD_X = ["--method", "esd", "--esd.variant", "x", "--train.scope", "auto"]
# The meta term, with an attacker who goes on for 80 steps and a goal beyond the anchor; the retain gradient at many
# timesteps holds what must be kept, where the two differences of the published losses are left out.
META = [
    "--meta.enabled", "true", "--meta.forbidden_loss", "erased", "--meta.forbidden_weight", "1",
    "--meta.negative_guidance", "1", "--meta.related_weight", "0", "--meta.unrelated_weight", "0",
    "--meta.inner_steps", "4", "--meta.inner_learning_rate", "2e-4", "--meta.restart_every", "20",
    "--meta.batch_size", "6", "--surgery.enabled", "true", "--surgery.rho", "2", "--retain.batch_size", "8",
    "--retain.timesteps", "uniform", "--retain.num_inference_steps", "12", "--train.scope", "full",
    "--train.learning_rate", "1e-4", "--train.lr_scheduler", "constant", "--max_train_steps", "400",
]  # fmt: skip
METHODS = {
    "kscu": [],
    "kscu+retain": [*RETAIN, "--surgery.projection", "none"],
    "kscu+surgery": RETAIN,
    "esd-x": ESD_X,
    "esd-x+retain": [*ESD_X, *RETAIN, "--surgery.projection", "none"],
    "esd-x+surgery": [*ESD_X, *RETAIN],
    "doco": [],
    "sdd": [],
    "uce": [],
    "rece": [],
    # What of it does the work: one line changed each.
    "doco: no surgery": ["--surgery.projection", "none", "--surgery.rho", "0"],
    "doco: retain loss only": ["--surgery.projection", "none"],
    "doco: projection only": ["--surgery.rho", "0"],
    "doco: released projection": ["--surgery.projection", "released"],
    "doco: optimizer metric": ["--surgery.metric", "optimizer"],
    "doco: global": ["--surgery.granularity", "global"],
    "doco: retain gradient in bf16": ["--surgery.retain_dtype", "bf16"],
    "doco: retain gradient in 8 bits": ["--surgery.retain_dtype", "int8"],
    "doco: unguided": ["--doco.guidance_scale", "1"],
    "doco: released discriminator": ["--doco.discriminator", "released"],
    # What makes an update smaller or cheaper, against the plain run.
    "kscu: bf16, fp32 masters": ["--mixed_precision", "bf16"],
    "kscu: fused, bf16": ["--engine", "fused", "--mixed_precision", "bf16"],
    "kscu: fused, bf16, 8-bit": ["--engine", "fused", "--mixed_precision", "bf16", "--optimizer.name", "adamw8bit"],
    "kscu: teacher in 8 bits": ["--teacher.storage", "int8"],
    "kscu: cached teacher": ["--teacher.storage", "cached"],
}
METHODS |= {f"{base}+meta": [*METHODS[base], *META] for base in ("esd-x", "sdd", "uce", "rece", "kscu")}
# The adversary's gradient over all weights is a hundred times as long as the other two, and learns first, 200 updates.
METHODS["doco+meta"] = [*META, "--meta.forbidden_weight", "100", "--surgery.rho", "200", "--max_train_steps", "600"]
# On top, for a kind or a concept: more to hold the rest, where its pictures change otherwise. What it costs is in
# benchmarks/results/minicanvas_tuning.md.
ON_TOP = {
    ("doco+meta", "style"): ["--surgery.rho", "1000", "--optimizer.adam_beta1", "0.9"],
    ("uce+meta", "ink style"): ["--surgery.rho", "10"],
    ("rece+meta", "ink style"): ["--surgery.rho", "10"],
}
# What of the meta term does the work, as above.
METHODS |= {
    "kscu+meta: a fresh attacker each time": [*META, "--meta.restart_every", "1"],
    "kscu+meta: no goal beyond the anchor": [*META, "--meta.negative_guidance", "0"],
    "kscu+meta: ascent": [*META, "--meta.forbidden_loss", "ascent", "--meta.negative_guidance", "0"],
    "kscu+meta: tied differences too": [*META, "--meta.related_weight", "0.1", "--meta.unrelated_weight", "0.1"],
    "kscu+meta: released coefficients": [
        *META, "--meta.coefficients", "released", "--meta.forbidden_loss", "ascent", "--meta.negative_guidance", "0",
    ],
    "kscu+meta: key steps": [*META, "--meta.timesteps", "key"],
    "kscu+meta: no retain gradient": [*META, "--surgery.enabled", "false"],
    "kscu: the same without the term": [*META, "--meta.enabled", "false"],
    "kscu: further beyond the anchor": [*META, "--meta.enabled", "false", "--kscu.negative_guidance", "4"],
}  # fmt: skip
BASE_METHODS = ["esd-x", "sdd", "uce", "rece", "kscu", "doco"]  # what `--methods base` stands for
OWN_CONFIGS = ("doco", "sdd", "uce", "rece")
DEFAULT_METHODS = ["kscu", "kscu+retain", "kscu+surgery", "esd-x", "esd-x+retain", "esd-x+surgery", "doco"]


def config_of(method: str, kind: str) -> Path:
    """The shipped configuration."""
    own = next((f"{name}_" for name in OWN_CONFIGS if method.startswith(name)), "")
    return ROOT / "configs" / f"minicanvas_{own}{kind}.toml"


@dataclass(frozen=True)
class Job:
    """One training run of the table."""

    method: str
    kind: str
    concept: str
    seed: int
    updates: int | None

    @property
    def name(self) -> str:
        """Folder of the run."""
        suffix = "" if self.updates is None else f"-{self.updates}"
        return f"{re.sub('[^a-z0-9+-]+', '_', self.method)}{suffix}-{self.concept.replace(' ', '_')}-{self.seed}"


def run_job(job: Job, output: Path, extra: Sequence[str]) -> dict:
    """Train unless it is done, and return the run's row."""
    folder = output / job.name
    if not (folder / "metrics.json").is_file():
        config = str(config_of(job.method, job.kind))
        command = [sys.executable, str(ROOT / "fastunlearn" / "train.py"), "--config", config]
        command += ["--concepts", job.concept, "--seed", str(job.seed), "--output_dir", str(folder)]
        command += ["--overwrite_output_dir", "true", *METHODS[job.method]]
        for what in (job.kind, job.concept):
            command += ON_TOP.get((job.method, what), [])
        command += extra
        if job.updates is not None:
            command += ["--max_train_steps", str(job.updates)]
        folder.mkdir(parents=True, exist_ok=True)
        with (output / f"{job.name}.log").open("w") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True, cwd=ROOT)
    metrics = json.loads((folder / "metrics.json").read_text())
    row = {"method": job.method, "kind": job.kind, "concept": job.concept, "seed": job.seed}
    row |= {"updates": metrics["updates"], "unet_evaluations": metrics["unet_evaluations"]["total"]}
    row |= {"seconds": metrics["seconds"]["total"]}
    after = metrics["evaluation"]["after"]
    return row | {name: after[name] for name in SCORES} | {"intervals": after["intervals"]}


def table(rows: Iterable[dict], means_only: bool = False) -> str:
    """Markdown: one line per run unless ``means_only``, then the mean of each method and kind. H: harmonic mean of UA,
    IRA and CRA."""
    rows = [row | {"H": harmonic_mean([row[name] for name in SCORES[:3]])} for row in rows]
    shown = (*SCORES[:3], "H", *SCORES[3:])
    columns = ("updates", "unet_evaluations", "seconds")
    heads = ["method", "concept", "seed", "updates", "U-Net evaluations", "s", *shown]
    lines: list[list[str]] = []
    groups: dict[tuple[str, str, int], list[dict]] = {}
    for row in sorted(rows, key=lambda row: (row["kind"], row["method"], row["updates"], row["concept"], row["seed"])):
        groups.setdefault((row["kind"], row["method"], row["updates"]), []).append(row)
    for (kind, method, _), group in groups.items():
        for row in [] if means_only else group:
            cells = [method, row["concept"], row["seed"], *(f"{row[name]:.0f}" for name in columns)]
            lines.append([*map(str, cells), *(_cell(row[name]) for name in shown)])
        means = [mean(row[name] for row in group) for name in columns]
        scores = [_mean_cell([row[name] for row in group if row[name] is not None]) for name in shown]
        cells = [method, f"**{kind}s, mean of {len(group)}**", "", *(f"{value:.0f}" for value in means), *scores]
        lines.append(cells)
    return markdown_table(heads, lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _mean_cell(values: list[float]) -> str:
    return f"**{mean(values):.3f}**" if values else ""


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it goes to every training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/quality"))
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, choices=["base", *METHODS])
    parser.add_argument("--styles", nargs="*", default=list(CONCEPTS["style"]))
    parser.add_argument("--objects", nargs="*", default=list(CONCEPTS["object"]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43])
    parser.add_argument("--updates", type=int, help="instead of the configuration's")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; one core each")
    parser.add_argument("--rows", type=Path, help="also write the rows to this JSON file")
    parser.add_argument("--show", nargs="+", type=Path, help="run nothing: the means of the rows in these files")
    return parser.parse_known_args()


def main() -> None:
    """Run what is missing and print the table."""
    args, extra = arguments()
    if args.show:
        print(table((row for file in args.show for row in json.loads(file.read_text())), means_only=True))
        return
    kinds = [("style", args.styles), ("object", args.objects)]
    jobs = [
        Job(method, kind, concept, seed, args.updates)
        for asked in args.methods
        for method in (BASE_METHODS if asked == "base" else [asked])
        for kind, concepts in kinds
        for seed in args.seeds
        for concept in concepts
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(tqdm(pool.map(lambda job: run_job(job, args.output, extra), jobs), total=len(jobs), unit="run"))
    if args.rows:
        args.rows.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
