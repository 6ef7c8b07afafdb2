"""KSCU as its paper-era trainer does it (github.com/chaoshuoZhang/KSCU at 02425e0, the "old" code of arXiv 2507.06526).

What it does: every update starts from fresh noise and walks all sampler steps up to its key step. Every prediction is a
guided pair, also where the guidance is 1 and the unconditional half cancels out, forward and backward. Two U-Nets in
fp32, Adam in fp32.
Per update at key step i, in single samples: sampler 2 i, frozen 4, student 4 forward and 4 backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastunlearn.denoisers.predictors import Evaluations
from fastunlearn.sampling.key_steps import KeyStep
from update.baselines.base import CONCEPT, STEPS, UNCOND, Baseline

STARTS, UPDATES = {"style": 24, "object": 15}, {"style": 500, "object": 750}
LOOP = 8
UNCOND_WEIGHT = 2e-5


class PaperKscu(Baseline):
    """A restart for every update."""

    NAME, METHOD, DTYPE = "paper_kscu", "kscu", torch.float32
    SUMMARY = "KSCU, paper-era: restart at every update, two U-Nets, unused halves of pairs, fp32"

    @classmethod
    def scope(cls, kind: str) -> str:
        """Styles: cross-attention; objects: all but it."""
        return "attn2" if kind == "style" else "noxattn_all"

    @classmethod
    def plan(cls, kind: str) -> list[KeyStep]:
        """The slice again and again; its start advances by one after every eight rounds, up to the last step."""
        indices: list[int] = []
        rounds = 0
        while len(indices) < UPDATES[kind]:
            indices += range(min(STARTS[kind] + rounds // LOOP, STEPS - 1), STEPS)
            rounds += 1
        return [KeyStep(i, 0, index, True, False) for i, index in enumerate(indices[: UPDATES[kind]])]

    @classmethod
    def stated(cls, step: KeyStep) -> Evaluations:
        """Four guided pairs, two of them with a gradient."""
        return Evaluations(teacher=4, student_forward=4, student_backward=4)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Adam as torch has it."""
        return torch.optim.Adam(self.trained, lr=1e-5)

    def update(self, step: KeyStep) -> None:
        """Two frozen pairs, two trained ones."""
        x, t = self.latents, self.at(step.index)
        cond, uncond = self.embeds(CONCEPT), self.embeds(UNCOND)
        positive = unguided(self.models.frozen(x, t, cond, uncond))
        neutral = unguided(self.models.frozen(x, t, uncond, uncond))
        negative = unguided(self.models.train(x, t, cond, uncond))
        unconditional = unguided(self.models.train(x, t, uncond, uncond))
        direction = positive - neutral
        loss = functional.mse_loss(negative, neutral - direction)
        weight = step.index / 10_000
        loss = loss + UNCOND_WEIGHT * functional.mse_loss(unconditional, neutral - weight * direction)
        self.backward(loss, 4 * self.batch)
        self.step()


def unguided(pair: tuple[Tensor, ...]) -> Tensor:
    """Guidance of 1: the unconditional half is there, and cancels out."""
    cond, uncond = pair
    return uncond + 1.0 * (cond - uncond)
