"""ESD as its SDXL script does it (github.com/rohitgandikota/erasing at 25613d2, ``esd_sdxl.py``; arXiv 2303.07345).

What it does: every update draws a sampler step uniformly and lets the original model draw from noise up to it, with
guidance. Two predictions of the original and one of the student, one call each. Two U-Nets, weights and Adam's state
in bf16. The loss is read by the host in every update. The script trains 200 updates.
Per update at step i, in single samples: sampler 2 i, frozen 2, student 1 forward and 1 backward; i is 24.5 on average.
The script also keeps both text encoders and the VAE on the device; they are left out here, to its advantage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fastunlearn.denoisers.predictors import Evaluations
from fastunlearn.models.backbone import Backbone
from fastunlearn.sampling.key_steps import KeyStep, uniform_table
from update.baselines.base import CONCEPT, STEPS, UNCOND, Baseline, Calls

UPDATES, SEED = 200, 42


class EsdSdxl(Baseline):
    """Full rollouts of the original."""

    NAME, METHOD, DTYPE = "esd_sdxl", "esd", torch.bfloat16
    SUMMARY = "ESD's SDXL script: a rollout of the original to a random step at every update, two U-Nets, bf16 Adam"
    guidance = 2.0

    @classmethod
    def scope(cls, kind: str) -> str:
        """ESD-x for styles, ESD-u for the rest, as its authors advise."""
        return "attn2" if kind == "style" else "noxattn"

    @classmethod
    def plan(cls, kind: str) -> list[KeyStep]:
        """One draw of the random steps; other seeds differ by a few percent."""
        return uniform_table(1, STEPS, UPDATES, SEED)

    @classmethod
    def stated(cls, step: KeyStep) -> Evaluations:
        """Three predictions."""
        return Evaluations(teacher=2, student_forward=1, student_backward=1)

    def make_models(self, backbone: Backbone, unet: nn.Module, teacher: Any) -> Calls:
        """The original walks the trajectories."""
        return Calls(backbone, unet, teacher, teacher)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Adam as torch has it, in the dtype of the weights."""
        return torch.optim.Adam(self.trained, lr=2e-4 if self.kind == "style" else 1e-5)

    def update(self, step: KeyStep) -> None:
        """Three calls and a step."""
        x, t = self.latents, self.at(step.index)
        cond, uncond = self.embeds(CONCEPT), self.embeds(UNCOND)
        (concept,) = self.models.frozen(x, t, cond)
        (null,) = self.models.frozen(x, t, uncond)
        (student,) = self.models.train(x, t, cond)
        loss = functional.mse_loss(student, concept - (concept - null))
        self.backward(loss, self.batch)
        loss.item()
        self.step()
