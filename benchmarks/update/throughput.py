"""What an update of the whole trainer costs: time and memory by phase, MFU, seconds per erased concept, beside others.

    python benchmarks/update/throughput.py --sweep engine=zero,fused surgery=off,int8       MiniCanvas, on this machine
    python benchmarks/update/throughput.py --sweep surgery=off,int8 stage=0,2 ranks=1,2 --updates 20
    python benchmarks/update/throughput.py --sweep meta=off,on,published,copy stage=0
    python benchmarks/update/throughput.py --model sdxl-random \\
        --sweep scope=attn2,noxattn,full batch=1,2,4 --sweep baseline=paper_kscu,quick_kscu --time-limit 540

--model: minicanvas; a diffusers folder, a .safetensors file or a hub id; or sdxl-random, sd15-random, sd21-random and
tiny-sdxl-random, whose weights are made on the device. --sweep takes name=value,value and may be given several times;
each is a product of its own. Names: model, kind (style, object), method, baseline (ours, or of baselines/),
engine, stage, ranks (through DeepSpeed's launcher), scope, batch, resolution, surgery (off, how the retain gradient is
kept, or loop: as published), meta (off, on, published: its loss and attack, or copy: with a copy of the model as well),
optimizer, attention, precision, checkpointing, cap (GiB), profile, whole (true: run every update of the concept by the
wall clock), and every field of the configuration by its dotted name. Each row is a process of its own; a row that runs
out of memory is a row that says so. Rows go to --json as they finish, and rows that are there are not measured again.

On a CPU it tests itself: evaluations and FLOPs mean the same everywhere, seconds do not.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from fastunlearn.utils.environment import prepare_environment  # noqa: E402

if __name__ == "__main__":
    prepare_environment(cpu_threads=1)

from fastunlearn.errors import UserError  # noqa: E402


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minicanvas", help="see above")
    parser.add_argument("--sweep", nargs="+", action="append", default=[], metavar="NAME=VALUE,VALUE")
    parser.add_argument("--memory-cap-gb", default="none", metavar="GIB",
                        help="emulate a smaller card: PyTorch gets that, less 1 GiB for the context")  # fmt: skip
    parser.add_argument("--updates", type=int, default=5, help="that are timed in each row")
    parser.add_argument("--warmup", type=int, default=2, help="updates before them")
    parser.add_argument("--walk", type=int, default=4, help="sampler steps of the restart that is timed")
    parser.add_argument("--time-limit", type=float, default=0.0, metavar="SECONDS", help="for all rows; 0: none")
    parser.add_argument("--json", type=Path, default=ROOT / "output" / "throughput.json")
    parser.add_argument("--markdown", type=Path, help="also write the report here")
    parser.add_argument("--report-only", action="store_true", help="measure nothing: the report of --json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the sweep and print its report; 2 where the request is wrong."""
    options = arguments()
    try:
        if options.worker:
            return worker(options)
        return sweep(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def worker(options: argparse.Namespace) -> int:
    """One row, in the process that the sweep has started for it."""
    from update.worker import work

    work(json.loads(options.worker), options.updates, options.warmup, options.walk, options.result)
    return 0


def sweep(options: argparse.Namespace) -> int:
    """All rows."""
    from update.instruments.environment import machine
    from update.report import markdown
    from update.rows import parse_sweep
    from update.sweep import Limits, load_rows, run_sweep

    if min(options.updates, options.warmup + 1, options.walk) < 1 or options.time_limit < 0:
        raise UserError("--updates and --walk are at least 1, --warmup and --time-limit not negative")
    late: list[dict[str, str]] = []
    if options.report_only:
        found = load_rows(options.json)
    else:
        caps = [entry for group in options.sweep for entry in group if entry.startswith("cap=") and entry != "cap=none"]
        if (caps or options.memory_cap_gb != "none") and machine()["gpu"] == "cpu":
            raise UserError("--memory-cap-gb: needs a GPU; a CPU process has no such limit. Leave it out")
        rows = parse_sweep(options.sweep, {"model": options.model, "cap": options.memory_cap_gb})
        limits = Limits(options.updates, options.warmup, options.walk, options.time_limit)
        command = "python " + shlex.join(["benchmarks/update/throughput.py", *sys.argv[1:]])
        found, late = run_sweep(rows, options.json, limits, command)
    text = markdown(found, late)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
