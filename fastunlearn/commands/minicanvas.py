"""``fastunlearn minicanvas path | sample | rebuild``: the embedded model, its folder, its pictures, its making."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fastunlearn.errors import UserError
from fastunlearn.minicanvas import OBJECTS, STYLES, pipeline_path
from fastunlearn.utils.folders.lock import folder_lock
from fastunlearn.utils.folders.marker import Kind, read_marker, record_files
from fastunlearn.utils.run_folder import LOCK

BUILD: Kind = "minicanvas build"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("path", help="print the pipeline folder and nothing else")
    sample = actions.add_parser("sample", help="draw prompts, or every object in every style")
    sample.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    sample.add_argument("--seed", type=int, default=42)
    sample.add_argument("--steps", type=int, default=25, help="DDIM steps (default 25)")
    sample.add_argument("--guidance_scale", type=float, default=4.0)
    sample.add_argument("--output", type=Path, default=Path("minicanvas.png"), help="PNG file to write")
    build = actions.add_parser("rebuild", help="make judge and model again from the drawings, and measure them")
    build.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to fill, or to go on with")
    build.add_argument(
        "--recipe", choices=["canvas", "v"], default="canvas",
        help="canvas: MiniCanvas (default); v: the model of benchmarks/second_model, in a checkout only",
    )  # fmt: skip
    build.add_argument("--processes", type=int, default=None, help="CPU processes (default: one per core)")
    build.add_argument("--quick", action="store_true", help="smoke test of every stage, a minute or two; draws noise")


def run(args: argparse.Namespace) -> int:
    """Do one of the three actions; return the exit status.

    Raises:
        UserError: a number out of range, or a file or folder that cannot be written.
    """
    if args.action == "path":
        print(pipeline_path())
        return 0
    _quiet()
    return _sample(args) if args.action == "sample" else _rebuild(args)


def _sample(args: argparse.Namespace) -> int:
    if not 1 <= args.steps <= 1000:
        raise UserError(f"--steps: {args.steps} is not allowed; 1 to 1000 are, 25 are enough")
    if not args.output.absolute().parent.is_dir():
        raise UserError(f"--output: {args.output}: its folder does not exist; create it first")
    from fastunlearn.evaluation.pictures.drawing import generate
    from fastunlearn.minicanvas.build import drawing
    from fastunlearn.minicanvas.build.editions import CANVAS
    from fastunlearn.models.loading import load_pipeline

    pipe = load_pipeline(pipeline_path())
    prompts, columns, titles = args.prompt, max(1, min(8, len(args.prompt))), list(args.prompt)
    if not prompts:
        cells = drawing.grid_cells()
        prompts = [CANVAS.prompt(*cell) for cell in cells]
        columns, titles = len(OBJECTS), [f"{OBJECTS[o]}, {STYLES[s]}" for o, s in cells]
    seeds = [args.seed + i for i in range(len(prompts))]
    images = generate(pipe, prompts, seeds, args.steps, args.guidance_scale, progress="drawing")
    try:
        drawing.save_grid(images, args.output, columns, titles)
    except (OSError, ValueError) as error:  # ValueError: Pillow knows no format of that name
        raise UserError(f"--output: {args.output} cannot be written: {error}") from error
    print(args.output)
    return 0


def _rebuild(args: argparse.Namespace) -> int:
    processes = (os.cpu_count() or 1) if args.processes is None else args.processes
    if processes < 1:
        raise UserError(f"--processes: {processes} is not allowed; 1 or more are")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output: {args.output} cannot be written: it is a file; give a folder")
    from fastunlearn.minicanvas.build.editions import EDITIONS

    edition = EDITIONS[args.recipe]
    if not edition.collection.pictures.is_dir():
        raise UserError(
            f"--recipe: the drawings of {args.recipe!r} are in a checkout of the repository, not in a wheel"
        )
    with folder_lock(args.output, "--output"):
        foreign = sorted(path.name for path in args.output.iterdir() if path.name != LOCK)
        if foreign and read_marker(args.output, BUILD) is None:
            raise UserError(
                f"--output: {str(args.output)!r} is not empty ({foreign[0]!r}), and no build began there; give another"
            )
        record_files(args.output, [], BUILD)
        from fastunlearn.minicanvas.build import drawing, rebuild

        build = rebuild.Build(args.output, processes, args.quick, edition)
        report = rebuild.rebuild(build, say=lambda line: print(line, flush=True))
    shares = ", ".join(f"{kind} {report[kind]:.3f}" for kind in drawing.KINDS if kind in report)
    print(f"{shares} of {report['images']} pictures read right")
    print(f"autoencoder {report['psnr_db']['mean']:.1f} dB; all figures: {args.output / 'check.json'}")
    print(args.output / "model")
    return 0


def _quiet() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more gain little at this size, and cost much on a busy machine
    from fastunlearn.minicanvas.build.fitting import hush

    hush()
