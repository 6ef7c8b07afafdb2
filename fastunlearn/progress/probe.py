"""Drawing the pictures of a probe, as latents, and comparing them with the original's.

Every rank draws its share of the batches, and all get every figure. A batch holds the same pictures on any number of
ranks, so that what is seen does not depend on it. A look begins with a glance at half of each concept's pictures: where
most of these are as ever, nothing more is drawn of it. ``reading.py`` has the legend.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastunlearn.models.backbone import Backbone
from fastunlearn.progress.prompts import kept_pictures, probe_pairs
from fastunlearn.progress.reading import GONE, Reading
from fastunlearn.progress.seen import Eyes
from fastunlearn.prompts.variants import UNCONDITIONAL, PromptTable
from fastunlearn.sampling.image_pool import Predict, draw_latents
from fastunlearn.utils.distributed import World, sum_over_ranks

if TYPE_CHECKING:
    from fastunlearn.config import Config

TINY = 1e-30
SAYS_NOTHING = 0.1
"""A pair whose two original pictures are closer than this, relative to how far pictures from different noise are apart,
does not show the concept: what becomes of it says nothing."""


@dataclass
class Batch:
    """Pictures that are drawn together: numbers among the pairs or what is kept, prompts' rows, seeds, originals."""

    concept: int | None
    """None: of what is kept."""
    owner: int
    """The rank that has their originals."""
    numbers: list[int]
    rows: list[int]
    anchor_rows: list[int]
    seeds: list[int]
    other_seeds: list[int]
    original: Tensor | None = None
    """z_c, or z_0."""
    aim: Tensor | None = None
    """z_a - z_c; of what is kept z_1 - z_0."""


class Probe:
    """The pictures of one run. ``originals`` comes first, while the model is still the original."""

    def __init__(
        self, cfg: Config, backbone: Backbone, prompt_table: PromptTable, world: World, eyes: Eyes | None = None
    ) -> None:
        self.settings, self.backbone, self.world = cfg.progress, backbone, world
        self.evaluations = 0
        self._eyes = eyes
        self.pairs, self.kept = probe_pairs(cfg), kept_pictures(cfg)
        self._concepts = len(cfg.concepts)
        index = prompt_table.index
        self._nothing = index[UNCONDITIONAL]
        pairs = [(index[p.prompt], index[p.anchor], p.seed, p.seed) for p in self.pairs]
        kept = [(index[k.prompt], index[k.prompt], k.seed, k.other_seed) for k in self.kept]
        self._owned, self._batch_size = 0, cfg.probe_batch_size
        self._of_concepts = [
            self._split(concept, {i: pairs[i] for i, pair in enumerate(self.pairs) if pair.concept == concept})
            for concept in range(self._concepts)
        ]
        self._of_kept = self._split(None, dict(enumerate(kept)))
        self._says = torch.ones(len(pairs), dtype=torch.bool)

    def originals(self, predict: Predict) -> None:
        """Draw what the original model makes of every prompt, with the concept and without it. Collective."""
        lengths = torch.zeros(2, max(len(self.pairs), len(self.kept)), dtype=torch.float64)
        for batch, mine in self._turns([*chain(*self._of_concepts), *self._of_kept]):
            original = self._draw(batch.rows, batch.seeds, predict)
            aim = self._draw(batch.anchor_rows, batch.other_seeds, predict) - original
            if mine:
                batch.original, batch.aim = original, aim
                lengths[int(batch.concept is None), batch.numbers] = _norms(aim).cpu()
        lengths = self._sum(lengths)
        self._apart = lengths[1, : len(self.kept)].mean().item()
        self._says = lengths[0, : len(self.pairs)] > SAYS_NOTHING * self._apart

    def look(self, update: int, predict: Predict) -> Reading:
        """Draw them with the model as it is now, and of a concept that is far from erased the first few. Collective."""
        half = math.ceil(self.settings.pairs / 2 / self._batch_size)
        first = [batch for batches in self._of_concepts for batch in batches[:half]]
        found = self._compare(first, predict)
        near = [concept for concept in range(self._concepts) if self._is_near(found, first, concept)]
        rest = [*chain(*(self._of_concepts[concept][half:] for concept in near)), *(self._of_kept if near else [])]
        found += self._compare(rest, predict)
        looked = [number for batch in (*first, *rest) if batch.concept is not None for number in batch.numbers]
        of = [sorted(i for i in looked if self.pairs[i].concept == concept) for concept in range(self._concepts)]
        seen_moved = tuple(tuple(found[0, i].item() for i in numbers if self._says[i]) for numbers in of)
        drift = found[1, : len(self.kept)].mean().item() / self._apart if near else float("nan")
        seen = None if self._eyes is None else tuple(found[2, numbers].mean().item() for numbers in of)
        return Reading(update, seen_moved, drift, seen)

    def _compare(self, batches: Sequence[Batch], predict: Predict) -> Tensor:
        """(3, N) fp64: how far each pair has moved, how far what is kept has gone, and what is still recognised; zero
        where nothing was drawn."""
        found = torch.zeros(3, max(len(self.pairs), len(self.kept)), dtype=torch.float64)
        for batch, mine in self._turns(batches):
            now = self._draw(batch.rows, batch.seeds, predict)
            if not mine:
                continue
            assert batch.original is not None and batch.aim is not None
            went, aim = (now - batch.original).double().flatten(1), batch.aim.double().flatten(1)
            if batch.concept is None:
                found[1, batch.numbers] = went.norm(dim=1).cpu()
                continue
            found[0, batch.numbers] = moved(went, aim).cpu()
            if self._eyes is not None:
                seen = self._eyes.sees(now, batch.concept)
                found[2, batch.numbers] = torch.tensor(seen, dtype=torch.float64)
        return self._sum(found) if batches else found

    def _is_near(self, found: Tensor, batches: Sequence[Batch], concept: int) -> bool:
        """Whether the rest of the concept's pictures is worth drawing: half of the first ones are gone, or a limit on
        the drift has to be watched."""
        numbers = [i for batch in batches if batch.concept == concept for i in batch.numbers]
        values = [found[0, i].item() for i in numbers if self._says[i]]
        return self.settings.max_drift is not None or sum(value > GONE for value in values) >= len(values) / 2

    def shows(self, concept: int) -> bool:
        """Whether the original draws anything else with the concept than without it."""
        return any(pair.concept == concept and self._says[i] for i, pair in enumerate(self.pairs))

    def _split(self, concept: int | None, pictures: Mapping[int, tuple[int, int, int, int]]) -> list[Batch]:
        size, batches, left = self._batch_size, [], list(pictures)
        for numbers in (left[start : start + size] for start in range(0, len(left), size)):
            columns = zip(*(pictures[number] for number in numbers), strict=True)
            rows, anchor_rows, seeds, other_seeds = map(list, columns)
            owner = self._owned % self.world.world_size
            self._owned += 1
            batches.append(Batch(concept, owner, numbers, rows, anchor_rows, seeds, other_seeds))
        return batches

    def _turns(self, batches: Sequence[Batch]) -> list[tuple[Batch, bool]]:
        """This rank's batches, and whether they count: where they do not come out even, some draw one that is not
        theirs, since all ranks of a sharded model have to call it equally often."""
        mine = [(batch, True) for batch in batches if batch.owner == self.world.rank]
        longest = max(Counter(batch.owner for batch in batches).values(), default=0)
        return mine + [(batch, False) for batch in batches[:1] for _ in range(longest - len(mine))]

    @torch.no_grad()
    def _draw(self, rows: Sequence[int], seeds: Sequence[int], predict: Predict) -> Tensor:
        """Final latents (B, C, H, W) fp32, by DDIM with guidance."""
        steps, scale = self.settings.num_inference_steps, self.settings.guidance_scale
        self.evaluations += 2 * steps * len(rows)
        return draw_latents(self.backbone, predict, rows, self._nothing, seeds, steps, scale).float()

    def _sum(self, table: Tensor) -> Tensor:
        """Over ranks: each figure is one rank's, and zero on the others."""
        return table if self.world.world_size == 1 else sum_over_ranks(table.to(self.world.device)).cpu()


def moved(went: Tensor, aim: Tensor) -> Tensor:
    """``moved`` of the legend for (B, D) differences from the original's pictures: (B,)."""
    return went.norm(dim=1) / aim.norm(dim=1).clamp(min=TINY)


def _norms(latents: Tensor) -> Tensor:
    return latents.double().flatten(1).norm(dim=1)
