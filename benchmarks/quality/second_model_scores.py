"""Scores of a model edited on the second embedded model: its own words and its own judge, before and after.

Its objects are not drawn as surely as MiniCanvas's (``second_model/README.md``), so every figure stands beside that of
the unedited model on the same pictures.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import second_model
from fastunlearn.utils.text import without_style

SEEDS = (188, 288, 588, 688)


def concepts(kind: str) -> list[str]:
    """As a user writes them."""
    if kind == "style":
        return [f"{style} style" for style in second_model.STYLES]
    return [name for name in second_model.OBJECTS if name not in second_model.CHARACTERS]


def questions(concept: str) -> list[tuple[str, str, str, str, int]]:
    """(part, prompt, object, style, seed): what asks for the concept, in the first template and in paraphrases, and
    everything else once."""
    word = without_style(concept)
    is_style = word in second_model.STYLES
    objects = [name for name in second_model.OBJECTS if is_style or name != word]
    styles = [name for name in second_model.STYLES if not is_style or name != word]
    pairs = [(name, word) for name in objects] if is_style else [(word, name) for name in styles]
    found = [("target", second_model.prompt(*pair), *pair, seed) for seed in SEEDS for pair in pairs]
    for i, pair in enumerate(pairs * 2):
        template = second_model.PARAPHRASES[i % len(second_model.PARAPHRASES)]
        found.append(("paraphrase", second_model.prompt(*pair, template), *pair, SEEDS[i // len(pairs)]))
    kept = product(objects, styles)
    return found + [("kept", second_model.prompt(*pair), *pair, SEEDS[i % 4]) for i, pair in enumerate(kept)]


def measure(folder: Path) -> dict[str, Any]:
    """Scores of a finished run, and those of the unedited model on the same pictures."""
    import torch

    from fastunlearn.config import load_config
    from fastunlearn.evaluation.pictures.drawing import generate
    from fastunlearn.models.loading import load_pipeline

    torch.set_num_threads(1)
    cfg = load_config(str(folder / "config.toml"), [])
    concept = cfg.concepts[0].name
    word, asked, judge = without_style(concept), questions(concept), second_model.load_judge()
    kind = 1 if word in second_model.STYLES else 0
    names = ([*second_model.OBJECTS, "other"], list(second_model.STYLES))
    scores: dict[str, Any] = {}
    for suffix, unet in (("_before", None), ("", folder / "unet")):
        pipe = load_pipeline(str(second_model.path()), unet_path=unet)
        images = generate(pipe, [q[1] for q in asked], [q[4] for q in asked])
        read = [logits.argmax(1).tolist() for logits in judge.classify(images)[:2]]
        seen = [(names[0][thing], names[1][style]) for thing, style in zip(*read, strict=True)]

        def share(part: str, of: int, right: bool = True, seen: list[tuple[str, str]] = seen) -> float:
            return mean((s[of] == q[2 + of]) == right for q, s in zip(asked, seen, strict=True) if q[0] == part)

        scores[f"UA{suffix}"], scores[f"UA_paraphrase{suffix}"] = (
            share(part, kind, right=False) for part in ("target", "paraphrase")
        )
        scores[f"IRA{suffix}"], scores[f"CRA{suffix}"] = share("kept", kind), share("kept", 1 - kind)
        scores[f"CRA_target{suffix}"] = share("target", 1 - kind)
    return scores
