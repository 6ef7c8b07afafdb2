"""``fastunlearn relearn --model OUT [...]``: attack what a run left, as a table or JSON, with a picture.

It writes two files, ``OUT/relearn.json`` and ``OUT/samples/relearn.png``, both at the end and each in one step, and
leaves everything else as it is. The test itself is in ``evaluation/relearning/``.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fastunlearn.errors import UserError
from fastunlearn.evaluation.attacks.settings import BASE_RATES, DATA, DEFAULT_STEPS, Settings, parse_seeds, parse_steps
from fastunlearn.evaluation.relearning.recognition import CURVES, METRIC_NAMES
from fastunlearn.export.traces import note_later_files, results_held
from fastunlearn.registry import ATTACKS
from fastunlearn.utils.files import atomic_write_text
from fastunlearn.utils.run_folder import CONFIG, RELEARNING, SAMPLES
from fastunlearn.utils.text import json_text

DEFAULTS = Settings()
PICTURE = f"{SAMPLES}/relearn.png"


def add_arguments(parser: ArgumentParser) -> None:
    """The options of ``fastunlearn relearn``; their values are checked by `settings_of`, for one kind of error."""
    steps = ",".join(str(step) for step in DEFAULT_STEPS)
    attacks = "; ".join(f"{name}: {attack.title}" for name, attack in ATTACKS.items())
    data = "; ".join(f"{name}: {text}" for name, text in DATA.items())
    add = parser.add_argument
    add("--model", required=True, metavar="OUT", help="output_dir of a finished run")
    add(
        "--attack",
        default=DEFAULTS.attack,
        metavar="NAME",
        help=f"what is trained ({attacks}); default {DEFAULTS.attack}",
    )
    add("--data", default=DEFAULTS.data, metavar="NAME", help=f"what is shown ({data}); default {DEFAULTS.data}")
    add("--steps", default=steps, metavar="N,N,...", help=f"when to measure, in attack steps; default {steps}")
    seeds, size, images = str(len(DEFAULTS.seeds)), str(DEFAULTS.batch_size), str(DEFAULTS.num_images)
    rank, dropout = str(DEFAULTS.lora_rank), f"{DEFAULTS.caption_dropout:g}"
    add("--seeds", default=seeds, metavar="N", help=f"number of seeds, or a list such as 4,7; default {seeds}")
    add("--learning_rate", default=None, metavar="X", help=f"of AdamW; {_usual_rates()}")
    add("--batch_size", default=size, metavar="N", help=f"pictures per step; default {size}")
    add(
        "--num_images",
        default=images,
        metavar="N",
        help=f"pictures drawn for the attacker by the original model, and as many held-out ones; default {images}",
    )
    add("--images", default=None, metavar="FOLDER", help="the attacker's own pictures, with captions, instead")
    add("--lora_rank", default=rank, metavar="N", help=f"default {rank}")
    add("--caption_dropout", default=dropout, metavar="X", help=f"share of the captions left empty; default {dropout}")
    add(
        "--sampler_steps",
        default=None,
        metavar="N",
        help="of the pictures that are looked at; default: as the run's evaluation",
    )
    add("--baseline", default=None, metavar="OUT", help="another finished run, attacked and plotted in the same way")
    add("--json", action="store_true", help="print JSON only")


def _usual_rates() -> str:
    """Such as "default 1e-4 on the embedded model, else 1e-5; lora 10 times that"."""
    embedded, other = (f"{BASE_RATES[which]:.0e}".replace("e-0", "e-") for which in (True, False))
    factors = [(name, attack.rate_factor) for name, attack in ATTACKS.items()]
    times = ", ".join(f"{name} {factor:g} times" for name, factor in factors if factor != 1)
    return f"default {embedded} on the embedded model, else {other}" + (f"; {times} that" if times else "")


def settings_of(args: Namespace) -> Settings:
    """The options as `Settings`.

    Raises:
        UserError: a value is not allowed.
    """
    given = ("batch_size", "num_images", "lora_rank", *(("sampler_steps",) if args.sampler_steps else ()))
    whole = {name: _whole(name, getattr(args, name)) for name in given}
    rate = None if args.learning_rate is None else _number("learning_rate", args.learning_rate)
    return Settings(
        attack=args.attack, data=args.data, steps=parse_steps(args.steps), seeds=parse_seeds(args.seeds),
        learning_rate=rate, images=args.images, caption_dropout=_number("caption_dropout", args.caption_dropout),
        **whole,
    )  # fmt: skip


def run(args: Namespace) -> int:
    """Attack ``args.model``; print a table, or with ``args.json`` nothing but JSON on stdout.

    Raises:
        UserError: bad options or folders, or an attack that diverged.
    """
    from fastunlearn.config import load_config
    from fastunlearn.utils.environment import prepare_environment

    settings, folder = settings_of(args), Path(args.model)
    with results_held(folder):
        # As many threads as the run had: on a busy machine a second one can make it many times slower.
        prepare_environment(load_config(str(folder / CONFIG), []).train.cpu_threads)
        from fastunlearn.evaluation.relearning.experiment import relearn

        result = relearn(folder, settings, args.baseline)
        write(result, folder)
    print(json_text(result) if args.json else table(result, folder))
    return 0


def write(result: dict, folder: Path) -> None:
    """``relearn.json`` and the picture."""
    from fastunlearn.evaluation.relearning.plot import draw

    note_later_files(folder, RELEARNING, PICTURE)
    atomic_write_text(folder / RELEARNING, json_text(result) + "\n")
    draw(result, folder / PICTURE)


def table(result: dict, folder: Path | None = None) -> str:
    """A result as plain text: one column per measured step, means over the seeds."""
    seeds = " ".join(str(seed) for seed in result["seeds"])
    optimizer = result["optimizer"]
    lines = [
        f"erased: {', '.join(result['concepts'])}   base: {result['base']}   attack: {result['attack']} "
        f"({ATTACKS[result['attack']].title})",
        f"pictures: {result['pictures']} ({result['data']}); AdamW, learning rate {optimizer['learning_rate']:g}, "
        f"batch {optimizer['batch_size']}; seeds {seeds}; mean +- standard deviation over the seeds",
    ]
    for curve in [result, result["baseline"]] if result["baseline"] else [result]:
        lines += ["", f"{curve['name']} ({curve['method']})", *_curve_rows(result, curve)]
    return "\n".join([*lines, "", *_notes(result, folder)])


def _curve_rows(result: dict, curve: dict) -> list[str]:
    rows = [f"{'attack steps':<18}" + "".join(f"{step:>14}" for step in result["steps"]) + f"{'original':>11}"]
    summary = curve["summary"]
    for name in (*CURVES, "error"):
        if summary[name] is None:
            continue
        title = "held-out error" if name == "error" else name
        cells = [_spread(*pair) for pair in zip(summary[name]["mean"], summary[name]["spread"], strict=True)]
        rows.append(f"{title:<18}" + "".join(f"{cell:>14}" for cell in cells) + f"{result['original'][name]:>11.3f}")
    if result["protocol"] is not None:
        rows.append(f"steps to half: {_half(summary['steps_to_half'], result['steps'][-1])}")
        rows.append(f"area under the recognised share: {_spread(**_pair(summary['area']))}")
    return rows


def _half(summary: dict, last: int) -> str:
    reached = f"{summary['reached']} of {summary['seeds']} seeds"
    if summary["mean"] is None:
        return f"more than {last}, or never ({reached} got there)"
    spread = "" if summary["spread"] is None else f" +- {summary['spread']:.1f}"
    return f"{summary['mean']:.1f}{spread} ({reached})"


def _pair(summary: dict) -> dict:
    return {"mean": summary["mean"], "spread": summary["spread"]}


def _spread(mean: float, spread: float | None) -> str:
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} +-{spread:.3f}"


def _notes(result: dict, folder: Path | None) -> list[str]:
    """What the figures rest on."""
    protocol = result["protocol"]
    if protocol is None:
        lines = [f"{', '.join(METRIC_NAMES[:-1])} and {METRIC_NAMES[-1]} are left out: {result['why_not_judged']}"]
    else:
        target, kept = (protocol["images"].get(part, 0) for part in ("target", "kept"))
        lines = [
            f"looked at: {target} pictures that ask for the erased, {kept} for the kept, a part of "
            f"the evaluation's; {protocol['sampler']}, {protocol['num_inference_steps']} steps, guidance "
            f"{protocol['guidance_scale']:g}"
        ]
    lines.append(f"held-out error: on {result['held_out']} pictures of the erased that the attacker does not have")
    if folder is not None:
        lines.append(f"picture: {folder / PICTURE}   {result['seconds']:.0f} s")
    return lines


def _whole(name: str, text: str) -> int:
    if not text.removeprefix("-").isdecimal():
        raise UserError(f"--{name}: {text!r} is not allowed; a whole number is needed")
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--{name}: {text!r} is not allowed; a number is needed") from None
