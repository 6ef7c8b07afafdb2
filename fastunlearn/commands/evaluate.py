"""``fastunlearn evaluate --model OUT [...]``: measure what a run left, as a table or JSON.

It writes one file, ``OUT/evaluation.json``, with ``--full`` also those of ``fastunlearn relearn``, and leaves all else
as it is. The measurement itself is in ``evaluation/``.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from fastunlearn.evaluation.metrics.scores import clear_difference
from fastunlearn.export.traces import note_later_files, results_held
from fastunlearn.registry import METRICS
from fastunlearn.utils.files import atomic_write_text
from fastunlearn.utils.run_folder import CONFIG, EVALUATION
from fastunlearn.utils.text import json_text

if TYPE_CHECKING:
    from fastunlearn.config import Config

SEEN_SHOWN = 5


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--model", required=True, metavar="OUT", help="output_dir of a finished run")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--quick", action="store_true", help="fewer images, wider intervals")
    parser.add_argument("--full", action="store_true", help="also the relearning test (see fastunlearn relearn)")


def run(args: Namespace) -> int:
    """Evaluate ``args.model``; print a table, or with ``args.json`` nothing but JSON on stdout.

    Raises:
        UserError: the folder is not what a finished run leaves, or no classifier knows its concepts.
    """
    from fastunlearn.config import load_config
    from fastunlearn.utils.environment import prepare_environment

    folder = Path(args.model)
    with results_held(folder):
        # As many threads as the run had: on a busy machine a second one can make the drawing many times slower.
        prepare_environment(load_config(str(folder / CONFIG), []).train.cpu_threads)
        from fastunlearn.evaluation.evaluate import evaluate_model

        config, result = evaluate_model(args.model, quick=args.quick)
        if args.full:
            from fastunlearn.commands.relearn import write
            from fastunlearn.evaluation.relearning import relearn

            result["relearn"] = relearn(args.model)
            write(result["relearn"], folder)
        text = json_text(result)
        note_later_files(folder, EVALUATION)
        atomic_write_text(folder / EVALUATION, text + "\n")
    print(text if args.json else table(config, result))
    return 0


def table(config: Config, result: dict) -> str:
    """Both models side by side, as plain text for a terminal (at most 100 columns, no colours)."""
    before, after = result["before"], result["after"]
    erased = ", ".join(concept.name for concept in config.concepts)
    lines = [f"erased: {erased}   base: {config.model.pretrained_model_name_or_path}   method: {config.method}", ""]
    lines.append(f"{'':<16}{'':<36}{'before':>8}{'after':>8}   {'95 % interval':<15}change")
    lines += [_figure_row(name, before, after) for name in config.evaluation.metrics if before[name] is not None]
    for kind in ("object", "style"):
        lines += ["", f"per {kind}: accuracy (*: erased; measured on the prompts that ask for it)"]
        lines += _class_rows(kind, before, after)
    lines += ["", "seen on the prompts that ask for the erased concept"]
    for name, seen in after["confusion"].items():
        shown = [f"{what} {count}" for what, count in list(seen.items())[:SEEN_SHOWN]]
        rest = sum(list(seen.values())[SEEN_SHOWN:])
        lines.append(f"  {name:<14}{', '.join(shown + ([f'others {rest}'] if rest else []))}")
    lines += ["", *drawn_lines(after["protocol"])]
    if "relearn" in result:
        from fastunlearn.commands.relearn import table as relearn_table

        lines += ["", "relearning test", relearn_table(result["relearn"])]
    return "\n".join(lines)


def _figure_row(name: str, before: dict, after: dict) -> str:
    low, high = after["intervals"][name]
    counts = before["counts"][name], after["counts"][name]
    change = f"{after[name] - before[name]:+.3f}"
    if not clear_difference(before[name], after[name], *counts):
        change += " (noise)"
    interval = f"{low:.3f}-{high:.3f}"
    return f"{name:<16}{METRICS[name].short:<36}{before[name]:>8.3f}{after[name]:>8.3f}   {interval:<15}{change}"


def _class_rows(kind: str, before: dict, after: dict) -> list[str]:
    erased = {c["name"] for c in after["protocol"]["concepts"] if c["kind"] == kind}
    rows = []
    for name, accuracy in after["per_class"][kind].items():
        mark = "*" if name in erased else " "
        rows.append(f"{mark} {name:<14}{'':<36}{before['per_class'][kind][name]:>8.3f}{accuracy:>8.3f}")
    return rows


def drawn_lines(protocol: dict) -> list[str]:
    """What the figures rest on."""
    parts = ", ".join(f"{part.replace('_', ' ')} {count}" for part, count in protocol["images"].items() if count)
    total = sum(protocol["images"].values())
    seeds = " ".join(str(seed) for seed in protocol["seeds"])
    lines = [
        f"images:  {total} per model ({parts})" + ("; --quick: a third of the full set" if protocol["quick"] else ""),
        f"sampler: {protocol['sampler']}, {protocol['num_inference_steps']} steps, "
        f"guidance {protocol['guidance_scale']:g}",
        f"seeds:   {seeds} (the same before and after)",
        *_wording(protocol),
        "noise:   the difference is within what this number of images gives by chance (95 %, Newcombe)",
    ]
    return lines


def _wording(protocol: dict) -> list[str]:
    """How the prompts are worded, where the grid has a rule for it."""
    others = ", ".join(f'"{template}"' for template in protocol.get("paraphrases", ()))
    if "template" not in protocol:
        return []
    return [f'prompts: "{protocol["template"]}"' + (f"; other wordings: {others}" if others else "")]
