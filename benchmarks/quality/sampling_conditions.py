"""Whether an erasure depends on how pictures are drawn afterwards: negative prompt, guidance, steps, sampler.

Draws the prompts that ask for the concept with diffusers' own pipeline, as a user of the result would, and has
MiniCanvas's judge look. One line per run, one column per condition: the share of pictures without the concept.

    python benchmarks/quality/sampling_conditions.py output/every/default-ink_style-42 output/every/default-cat-42
    python benchmarks/quality/sampling_conditions.py --show rows.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

from markdown_table import markdown_table  # noqa: E402

USUAL = {"negative_prompt": None, "guidance_scale": 5.0, "num_inference_steps": 20, "sampler": "euler"}
CONDITIONS: dict[str, dict[str, Any]] = {
    "Euler, 20 steps, guidance 5": {},
    'negative prompt ""': {"negative_prompt": ""},
    'negative prompt "blurry, low quality"': {"negative_prompt": "blurry, low quality"},
    "guidance 3": {"guidance_scale": 3.0},
    "guidance 7.5": {"guidance_scale": 7.5},
    "50 steps": {"num_inference_steps": 50},
    "DDIM": {"sampler": "ddim"},
}
BATCH = 20


def erased_shares(folder: Path, seeds: int, edited: bool = True) -> dict[str, float]:
    """By condition: the share of pictures in which the judge does not see the concept of a finished run."""
    import torch
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    from fastunlearn.config import load_config
    from fastunlearn.evaluation.classifiers.base import choose_classifier
    from fastunlearn.models.loading import load_pipeline
    from fastunlearn.schema.sections import EvaluationConfig

    torch.set_num_threads(1)
    cfg = load_config(str(folder / "config.toml"), []).model_copy(
        update={"evaluation": EvaluationConfig(target_seeds=seeds)}
    )
    classifier = choose_classifier(cfg)
    asked = [sample for sample in classifier.grid(cfg).samples if sample.part == "target"]
    concepts = [sample.concept for sample in asked if sample.concept is not None]
    pipe = load_pipeline(cfg.model.pretrained_model_name_or_path, unet_path=folder / "unet" if edited else None)
    pipe.set_progress_bar_config(disable=True)
    samplers = {
        "euler": EulerDiscreteScheduler.from_config(pipe.scheduler.config),
        "ddim": DDIMScheduler.from_config(pipe.scheduler.config),
    }
    look = classifier.load("cpu").look
    found = {}
    for name, changed in tqdm(CONDITIONS.items(), desc=folder.name, unit="condition"):
        options = USUAL | changed
        pipe.scheduler = samplers[options.pop("sampler")]
        negative = options.pop("negative_prompt")
        images = []
        for start in range(0, len(asked), BATCH):
            batch = asked[start : start + BATCH]
            images.append(
                pipe(
                    prompt=[sample.prompt for sample in batch],
                    negative_prompt=None if negative is None else [negative] * len(batch),
                    generator=[torch.Generator().manual_seed(sample.seed) for sample in batch],
                    height=64,
                    width=64,
                    output_type="pt",
                    **options,
                ).images
            )
        labels = look(torch.cat(images))
        of = [getattr(label, concept.kind) != concept.name for label, concept in zip(labels, concepts, strict=True)]
        found[name] = mean(of)
    return found


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: a line per run, and how far the conditions are apart."""
    lines = []
    for row in rows:
        shares = [row["shares"][name] for name in CONDITIONS]
        lines.append([row["run"], *(f"{share:.3f}" for share in shares), f"{max(shares) - min(shares):.3f}"])
    return markdown_table(["erased", *CONDITIONS, "largest difference"], lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="output folders of finished runs on MiniCanvas")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt")
    parser.add_argument("--unedited", action="store_true", help="the model before the edit instead")
    parser.add_argument("--rows", type=Path, help="also write the rows to this JSON file")
    parser.add_argument("--show", nargs="+", type=Path, help="draw nothing: the table of the rows in these files")
    return parser.parse_args()


def main() -> None:
    """Draw, look, print."""
    args = arguments()
    if args.show:
        print(table(row for file in args.show for row in json.loads(file.read_text())))
        return
    rows = [
        {"run": folder.name, "shares": erased_shares(folder, args.seeds, not args.unedited)} for folder in args.folders
    ]
    if args.rows:
        args.rows.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
