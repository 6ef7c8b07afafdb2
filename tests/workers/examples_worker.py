"""A training and an attack with everything that docs/developing.md adds: `python examples_worker.py FOLDER`.

The files of its examples are written to FOLDER and found as modules of the package; its lines are entered in the
registry. That has to come before the configuration is imported, which is why this is a process of its own.
"""

from __future__ import annotations

import ast
import contextlib
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from doc_pages import Block, blocks

from fastunlearn import registry

PLACE = "# fastunlearn/"
LINE = f"{PLACE}registry.py, in "


def enter(block: Block) -> None:
    """A block that is a line of the registry."""
    first, _, lines = block.text.partition("\n")
    getattr(registry, first.removeprefix(LINE)).entries.update(ast.literal_eval("{" + lines + "}"))


def write(block: Block, folder: Path) -> None:
    """A block that is a file of the package."""
    name = block.text.partition("\n")[0].removeprefix("# ")
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(block.text, encoding="utf-8")
    package = import_module(".".join(Path(name).parent.parts))
    package.__path__.append(str(file.parent))


def main(folder: Path) -> None:
    """Help, a run of two updates on MiniCanvas with an evaluation, and an attack on it."""
    examples = [block for block in blocks("python") if block.text.startswith(PLACE)]
    for block in examples:
        if block.text.startswith(LINE):
            enter(block)
    for block in examples:
        if not block.text.startswith(LINE):
            write(block, folder)
    from fastunlearn import cli

    with contextlib.suppress(SystemExit):
        cli.main(["train", "--help"])
    out = str(folder / "run")
    run = [
        "--concepts", "ink style", "--method", "replace", "--engine", "plain", "--optimizer.name", "sgd",
        "--max_train_steps", "2", "--sampler.num_inference_steps", "4", "--train.cpu_threads", "1",
        "--evaluation.classifier", "grey", "--evaluation.metrics", "UA; IRA; drawn", "--evaluation.batch_size", "10",
        "--evaluation.num_inference_steps", "4", "--export.formats", "unet; distances",
        "--retain.num_inference_steps", "2", "--report.num_validation_seeds", "1", "--report.report_to", "none",
        "--progress.enabled", "false",
    ]  # fmt: skip
    attack = ["--attack", "biases", "--steps", "0,1", "--seeds", "1", "--batch_size", "2", "--num_images", "2"]
    sys.exit(cli.main(["train", *run, "--output_dir", out]) or cli.main(["relearn", "--model", out, *attack]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
