"""Drawing the pictures of a probe, as latents, and comparing them with the original's.

Every rank draws its share of the batches, and all get every figure. A batch holds the same pictures on any number of
ranks, so that what is seen does not depend on it. ``reading.py`` has the legend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.models.backbone import Backbone
from fastunlearn.progress.prompts import kept_pictures, probe_pairs
from fastunlearn.progress.reading import Reading
from fastunlearn.prompts.variants import UNCONDITIONAL, PromptTable
from fastunlearn.utils.distributed import World, sum_over_ranks

if TYPE_CHECKING:
    from fastunlearn.config import Config

Predict = Callable[[Tensor, Tensor, PromptEmbeds, PromptEmbeds], tuple[Tensor, ...]]
"""(latents, timesteps, conditional, unconditional) -> the two predictions."""

SAYS_NOTHING = 0.1
"""A pair whose two original pictures are closer than this, relative to how far pictures from different noise are apart,
does not show the concept: what becomes of it says nothing."""


@dataclass
class Batch:
    """Pictures that are drawn together: their numbers among all of their group, prompts' rows, seeds, and originals."""

    group: str
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

    def __init__(self, cfg: Config, backbone: Backbone, prompt_table: PromptTable, world: World) -> None:
        self.settings, self.backbone, self.world = cfg.progress, backbone, world
        self.evaluations = 0
        self.pairs, self.kept = probe_pairs(cfg), kept_pictures(cfg)
        self._concepts = len(cfg.concepts)
        index = prompt_table.index
        self._nothing = index[UNCONDITIONAL]
        pairs = [(index[p.prompt], index[p.anchor], p.seed, p.seed) for p in self.pairs]
        kept = [(index[k.prompt], index[k.prompt], k.seed, k.other_seed) for k in self.kept]
        self._batches = [*self._split("pairs", pairs), *self._split("kept", kept)]
        self._says = torch.ones(len(pairs), dtype=torch.bool)

    def originals(self, predict: Predict) -> None:
        """Draw what the original model makes of every prompt, with the concept and without it. Collective."""
        lengths = torch.zeros(2, max(len(self.pairs), len(self.kept)), dtype=torch.float64)
        for batch, mine in self._turns():
            original = self._draw(batch.rows, batch.seeds, predict)
            aim = self._draw(batch.anchor_rows, batch.other_seeds, predict) - original
            if mine:
                batch.original, batch.aim = original, aim
                lengths[0 if batch.group == "pairs" else 1, batch.numbers] = _norms(aim).cpu()
        lengths = self._sum(lengths)
        self._apart = lengths[1, : len(self.kept)].mean().item()
        self._says = lengths[0, : len(self.pairs)] > SAYS_NOTHING * self._apart

    def look(self, update: int, predict: Predict) -> Reading:
        """Draw them with the model as it is now. Collective."""
        found = torch.zeros(2, max(len(self.pairs), len(self.kept)), dtype=torch.float64)
        for batch, mine in self._turns():
            now = self._draw(batch.rows, batch.seeds, predict)
            if not mine:
                continue
            assert batch.original is not None and batch.aim is not None
            went, aim = (now - batch.original).double().flatten(1), batch.aim.double().flatten(1)
            if batch.group == "pairs":
                found[0, batch.numbers] = ((went * aim).sum(1) / (aim * aim).sum(1)).cpu()
            else:
                found[1, batch.numbers] = went.norm(dim=1).cpu()
        found = self._sum(found)
        moved = tuple(
            tuple(found[0, i].item() for i, pair in enumerate(self.pairs) if pair.concept == concept and self._says[i])
            for concept in range(self._concepts)
        )
        drift = found[1, : len(self.kept)].mean().item() / self._apart if self.kept else float("nan")
        return Reading(update, moved, drift)

    def shows(self, concept: int) -> bool:
        """Whether the original draws anything else with the concept than without it."""
        return any(pair.concept == concept and self._says[i] for i, pair in enumerate(self.pairs))

    def _split(self, group: str, pictures: Sequence[tuple[int, int, int, int]]) -> list[Batch]:
        size = self.settings.batch_size
        batches = []
        for start in range(0, len(pictures), size):
            rows, anchor_rows, seeds, others = map(list, zip(*pictures[start : start + size], strict=True))
            numbers = list(range(start, start + len(rows)))
            batches.append(Batch(group, numbers, rows, anchor_rows, seeds, others))
        return batches

    def _turns(self) -> list[tuple[Batch, bool]]:
        """This rank's batches, and whether they count: where they do not come out even, some draw one once more, since
        all ranks of a sharded model have to call it equally often."""
        ranks, count = self.world.world_size, len(self._batches)
        places = range(self.world.rank, -(-count // ranks) * ranks, ranks)
        return [(self._batches[place % count], place < count) for place in places]

    @torch.no_grad()
    def _draw(self, rows: Sequence[int], seeds: Sequence[int], predict: Predict) -> Tensor:
        """Final latents (B, C, H, W) fp32, by DDIM with guidance."""
        noise, shape = self.backbone.noise, self.backbone.sample_shape
        steps, guidance = self.settings.num_inference_steps, self.settings.guidance_scale
        cond = self.backbone.embeds.select(list(rows))
        uncond = self.backbone.embeds.select([self._nothing] * len(rows))
        initial = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        latents = (initial * noise.init_noise_sigma).to(noise.device)
        for timestep in noise.timesteps(steps):
            timesteps = noise.expand(timestep, len(latents))
            with_prompt, without = predict(latents, timesteps, cond, uncond)
            latents = noise.step(with_prompt, without, latents, timesteps, steps, guidance)
            self.evaluations += 2 * len(latents)
        return latents.float()

    def _sum(self, table: Tensor) -> Tensor:
        """Over ranks: each figure is one rank's, and zero on the others."""
        return table if self.world.world_size == 1 else sum_over_ranks(table.to(self.world.device)).cpu()


def _norms(latents: Tensor) -> Tensor:
    return latents.double().flatten(1).norm(dim=1)


def probe_evaluations(pairs: int, kept: int, steps: int) -> tuple[int, int]:
    """Single-sample evaluations of (the originals, one probe) of so many pairs and kept pictures."""
    return 4 * steps * (pairs + kept), 2 * steps * (pairs + kept)
