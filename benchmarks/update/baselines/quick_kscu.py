"""KSCU as its released quick trainer does it (github.com/ChaoShuoZhang/KeyStepConceptUnlearning at a8adc01).

What it does: one trajectory walks the slice, and a fresh one starts only when the slice begins again. Four predictions
per update, one call each; then one guided pair, of the same model at the same latents, to move the trajectory on. One
U-Net with a frozen copy of what it trains, exchanged by pointer; weights and Adam's state in bf16. The loss is read by
the host in every update.
Per update, in single samples: frozen 2, student 2 forward and 2 backward, sampler 2 unless the slice ends there; and
2 S for a restart at index S.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fastunlearn.denoisers.predictors import Evaluations
from fastunlearn.denoisers.teacher import Teacher
from fastunlearn.sampling.key_steps import KeyStep, key_step_table
from update.baselines.base import CONCEPT, STEPS, UNCOND, Baseline

STARTS, UPDATES = {"style": 24, "object": 14}, {"style": 500, "object": 750}
UNCOND_WEIGHT, UNCOND_SLOPE = 1e-4, 2e-5


class QuickKscu(Baseline):
    """One trajectory, five calls per update."""

    NAME, METHOD, DTYPE = "quick_kscu", "kscu", torch.bfloat16
    SUMMARY = "KSCU, released quick trainer: walks the slice, a sampler pair beside four predictions, bf16 Adam"

    @classmethod
    def scope(cls, kind: str) -> str:
        """Styles: cross-attention; objects: all but it."""
        return "attn2" if kind == "style" else "noxattn_all"

    @classmethod
    def plan(cls, kind: str) -> list[KeyStep]:
        """The published table, which is also ours."""
        return key_step_table([STARTS[kind]], STEPS, UPDATES[kind])

    @classmethod
    def stated(cls, step: KeyStep) -> Evaluations:
        """Four predictions, and a pair for the sampler."""
        advance = 2 if step.continues else 0
        return Evaluations(teacher=2, rollout=advance, student_forward=2, student_backward=2)

    def make_teacher(self, unet: nn.Module) -> Any:
        """The same U-Net with the originals in place."""
        return Teacher(unet, self.names, whole_copy=False)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Adam as torch has it, in the dtype of the weights."""
        return torch.optim.Adam(self.trained, lr=1e-5)

    def update(self, step: KeyStep) -> None:
        """Four calls, a step, and the sampler's call."""
        x, t = self.latents, self.at(step.index)
        cond, uncond = self.embeds(CONCEPT), self.embeds(UNCOND)
        (positive,) = self.models.frozen(x, t, cond)
        (neutral,) = self.models.frozen(x, t, uncond)
        (negative,) = self.models.train(x, t, cond)
        (unconditional,) = self.models.train(x, t, uncond)
        direction = positive - neutral
        loss = functional.mse_loss(negative, neutral - direction)
        weight = ((1000 - t) * UNCOND_SLOPE).view(-1, 1, 1, 1)
        loss = loss + UNCOND_WEIGHT * functional.mse_loss(unconditional, neutral - weight * direction)
        self.backward(loss, 2 * self.batch)
        self.step()
        loss.item()
        if step.continues:
            self.walk(step.index)
