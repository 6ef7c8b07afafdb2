"""What the embedded classifier wants to see: every prompt and seed of MiniCanvas, by what it measures.

The miniature of UnlearnCanvas' grid (Zhang et al., arXiv:2402.11846): "a {object} image in {style} style" with fixed
seeds that all prompts share, and on top of it prompts that no erasure recipe uses (paraphrases, synonyms). Nothing here
imports torch; drawing is in `evaluation/pictures/`, the figures are in `evaluation/metrics/`.

Parts, with their default number of images:

* target (80 for a style, 64 for an object, with 8 seeds): asks for an erased concept beside each kept class of the
  other kind.
* kept (140 or 144): every kept object x kept style; a kept sample never asks for an erased concept.
* paraphrase (40), kept_paraphrase (40): the same two questions in `PARAPHRASES` wordings.
* synonym (16, objects only): the target question with another word for the object.

With several erased concepts the target parts grow with each of them. ``quick`` keeps about a third of every part.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from fastunlearn.evaluation.pictures.grid import Erased, EvaluationGrid, EvaluationSample
from fastunlearn.minicanvas.vocabulary import (
    EVALUATION_TEMPLATE,
    OBJECTS,
    PARAPHRASES,
    STYLES,
    SYNONYMS,
    concept_kind,
    normalise_concept,
)

NAME = "minicanvas-1"  # with a version, as pictures of different grids cannot be compared
SEEDS = (188, 288, 588, 688, 888)  # UnlearnCanvas' own
PARAPHRASE_IMAGES, SYNONYM_IMAGES = 40, 16
QUICK_SHARE = 3
PARTS = ("target", "kept", "paraphrase", "kept_paraphrase", "synonym")


def known_concepts(names: Sequence[str]) -> tuple[Erased, ...] | None:
    """The concepts in MiniCanvas' words, without repetitions; None if it does not know one of them."""
    kinds = [(normalise_concept(name), concept_kind(name)) for name in names]
    if not names or any(kind is None for _, kind in kinds):
        return None
    return tuple(dict.fromkeys(Erased(name, str(kind)) for name, kind in kinds))


def build_grid(
    concepts: Sequence[Erased],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    seeds: Sequence[int] = SEEDS,
    target_seeds: int = 8,
    retain_seeds: int = 2,
    quick: bool = False,
) -> EvaluationGrid:
    """Lay out the grid for these erased concepts.

    ``target_seeds`` and ``retain_seeds`` say how many seeds each prompt gets; beyond ``seeds`` they continue by 1000.

    Raises:
        ValueError: nothing is left to keep in one of the two kinds, so that nothing could be compared.
    """
    kept = {
        "object": [name for name in OBJECTS if Erased(name, "object") not in concepts],
        "style": [name for name in STYLES if Erased(name, "style") not in concepts],
    }
    if not kept["object"] or not kept["style"]:
        raise ValueError("every object or every style is erased: nothing is left to measure what was kept")
    samples: list[EvaluationSample] = []
    for concept in concepts:
        pairs = _pairs_of(concept, kept)
        samples += _grid("target", pairs, seed_list(seeds, target_seeds), quick, concept)
        samples += _reworded("paraphrase", pairs, PARAPHRASES, seeds, PARAPHRASE_IMAGES, quick, concept)
        if concept.kind == "object":
            words = [EVALUATION_TEMPLATE.replace("{object}", word) for word in SYNONYMS[concept.name]]
            samples += _reworded("synonym", pairs, words, seeds, SYNONYM_IMAGES, quick, concept)
    pairs = list(product(kept["object"], kept["style"]))
    samples += _grid("kept", pairs, seed_list(seeds, retain_seeds), quick, None)
    # A stride that shares no factor with the grid's sides, so that a few images still visit every class.
    samples += _reworded("kept_paraphrase", _spread(pairs), PARAPHRASES, seeds, PARAPHRASE_IMAGES, quick, None)
    samples.sort(key=lambda sample: PARTS.index(sample.part))
    return EvaluationGrid(
        NAME,
        tuple(concepts),
        tuple(samples),
        num_inference_steps,
        guidance_scale,
        quick,
        parts=PARTS,
        wording={"template": EVALUATION_TEMPLATE, "paraphrases": list(PARAPHRASES)},
    )


def seed_list(seeds: Sequence[int], count: int) -> list[int]:
    """The first ``count`` seeds; after the end the list continues with 1000 added, then 2000 and so on."""
    return [seeds[i % len(seeds)] + 1000 * (i // len(seeds)) for i in range(count)]


def _pairs_of(concept: Erased, kept: dict[str, list[str]]) -> list[tuple[str, str]]:
    """(object, style) of the prompts that ask for an erased concept beside something that is kept."""
    if concept.kind == "style":
        return [(name, concept.name) for name in kept["object"]]
    return [(concept.name, name) for name in kept["style"]]


def _grid(
    part: str, pairs: Sequence[tuple[str, str]], seeds: Sequence[int], quick: bool, concept: Erased | None
) -> list[EvaluationSample]:
    """Every pair with every seed. Quick takes a diagonal third, which visits all classes evenly."""
    rows: dict[str, int] = {}
    columns: dict[str, int] = {}
    samples = []
    for turn, seed in enumerate(seeds):
        for name, style in pairs:
            diagonal = rows.setdefault(name, len(rows)) + columns.setdefault(style, len(columns)) + turn
            if not quick or diagonal % QUICK_SHARE == 0:
                prompt = EVALUATION_TEMPLATE.format(object=name, style=style)
                samples.append(EvaluationSample(part, prompt, seed, name, style, concept))
    return samples


def _reworded(
    part: str,
    pairs: Sequence[tuple[str, str]],
    templates: Sequence[str],
    seeds: Sequence[int],
    count: int,
    quick: bool,
    concept: Erased | None,
) -> list[EvaluationSample]:
    """``count`` images that go round the pairs; each further round moves on to the next wording and the next seed."""
    count = max(1, count // QUICK_SHARE) if quick else count
    turns = seed_list(seeds, -(-count // len(pairs)))
    samples = []
    for i in range(count):
        turn, (name, style) = i // len(pairs), pairs[i % len(pairs)]
        prompt = templates[(i + turn) % len(templates)].format(object=name, style=style)
        samples.append(EvaluationSample(part, prompt, turns[turn], name, style, concept))
    return samples


def _spread(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Reorder a grid so that its first images already visit all rows and columns."""
    stride = next(step for step in (11, 13, 17, 19, 23) if len(pairs) % step)
    return [pairs[i * stride % len(pairs)] for i in range(len(pairs))]
