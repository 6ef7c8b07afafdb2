"""DoCo as its released trainer does it (github.com/yongliang-wu/DoCo at ebf6ff4; arXiv 2405.15304).

What it does: half of a batch are anchor pictures with the concept's prompt, half are pictures to keep. One forward pass
for all of them; the retain loss goes back through the joint graph, which is kept, and the adversarial loss goes back
through it again, each with half of its output gradient zero. Then a Python loop over the trained tensors: norms, a dot
product, and an ``if`` that waits for the device, in each. The discriminator's turn comes in every update, and the
allocator's cache is emptied. fp32, two U-Nets, AdamW.
Per update with b pictures in each half, in single samples: frozen b, student 2 b forward and 4 b backward; in the
warm-up 2 b forward, with a graph that nobody uses, and no backward. Published: b = 8, 2,000 updates, of which 1,001
are warm-up.
The VAE encodes 2 b pictures in every published update; that is left out here, to its advantage, as are the detached
keys and values of the first token, which cost nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastunlearn.denoisers.predictors import Evaluations
from fastunlearn.methods.parts.discriminator import Discriminator, bce_to
from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.sampling.key_steps import KeyStep
from update.baselines.base import ANCHOR, CONCEPT, Baseline
from update.instruments.clock import Clock

UPDATES, WARMUP = 2000, 1001


class DocoLoop(Baseline):
    """The joint graph twice, and a loop over tensors."""

    NAME, METHOD, DTYPE = "doco_loop", "doco", torch.float32
    SUMMARY = "DoCo, released: joint graph of both halves, two backward passes through it, a host sync per tensor, fp32"

    @classmethod
    def scope(cls, kind: str) -> str:
        """Keys and values of the cross-attentions."""
        return "attn2_kv"

    @classmethod
    def plan(cls, kind: str) -> list[KeyStep]:
        """``continues`` stands for an update in which the student learns."""
        return [KeyStep(i, 0, 0, False, i >= WARMUP) for i in range(UPDATES)]

    @classmethod
    def stated(cls, step: KeyStep) -> Evaluations:
        """For one picture in each half."""
        return Evaluations(teacher=1, student_forward=2, student_backward=4 if step.continues else 0)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW; and the discriminator with its Adam."""
        channels, side, _ = self.backbone.sample_shape
        self.judge = Discriminator(channels, side, released=True, seed=0).to(self.device)
        self.judge_optimizer = torch.optim.Adam(self.judge.parameters(), lr=5e-4, betas=(0.5, 0.999))
        self.pictures = torch.randn(2 * self.batch, *self.backbone.sample_shape, device=self.device)
        self.alphas = self.backbone.noise.alphas_cumprod
        return torch.optim.AdamW(self.trained, lr=4.8e-5, weight_decay=1e-2)

    def steps(self) -> list[KeyStep]:
        """The part in which the student learns: that is what is timed."""
        return self.plan(self.kind)[WARMUP:]

    def restart(self, step: KeyStep, index: int) -> None:
        """There is no trajectory."""

    def update(self, step: KeyStep) -> None:
        """One step of student and discriminator."""
        half = self.batch
        noise = torch.randn_like(self.pictures)
        times = torch.randint(0, len(self.alphas), (2 * half,), device=self.device)
        alpha = self.alphas[times].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * self.pictures + (1 - alpha).sqrt() * noise
        prompts = PromptEmbeds.cat([self.embeds(CONCEPT), self.embeds(ANCHOR)])
        (both,) = self.models.train(noisy, times, prompts)
        (anchor,) = self.models.frozen(noisy[:half], times[:half], self.embeds(ANCHOR))
        concept_image = estimate(both[:half], noisy[:half], alpha[:half])
        anchor_image = estimate(anchor, noisy[:half], alpha[:half])
        if step.continues:
            self.retain_loss = functional.mse_loss(both[half:], noise[half:])
            self.unlearn_loss = bce_to(self.judge(concept_image, times[:half]), 0.0)
            self.two_gradients()
            self.surgery()
            self.step()
        self.judge_turn(concept_image.detach(), anchor_image, times[:half])

    def two_gradients(self) -> None:
        """Both through the graph of all samples."""
        self.optimizer.zero_grad()
        self.backward(self.retain_loss, 2 * self.batch, keep_graph=True)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.kept = [gradient(parameter).clone() for parameter in self.trained]
        self.optimizer.zero_grad()
        self.backward(self.unlearn_loss, 2 * self.batch)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)

    def surgery(self) -> None:
        """The released projection, tensor by tensor; each ``if`` waits for the device."""
        for parameter, kept in zip(self.trained, self.kept, strict=True):
            unit = kept / (torch.linalg.vector_norm(kept) + 1e-8)
            own = gradient(parameter)
            cosine = torch.dot((own / (torch.linalg.vector_norm(own) + 1e-8)).flatten(), unit.flatten())
            if cosine < 0:
                own -= cosine * unit
        self.kept = []

    def watch(self, clock: Clock) -> None:
        """Its phases; clipping and the discriminator's turn are "other"."""
        super().watch(clock)
        clock.watch(self, "surgery", "surgery")

    def judge_turn(self, concept: Tensor, anchor: Tensor, times: Tensor) -> None:
        """The discriminator; what the student's loss left in its gradient is not cleared, as published."""
        loss = bce_to(self.judge(anchor, times), 0.0) + bce_to(self.judge(concept, times), 1.0)
        loss.backward()
        self.judge_optimizer.step()
        self.judge_optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def gradient(parameter: Tensor) -> Tensor:
    """It has one."""
    assert parameter.grad is not None
    return parameter.grad


def estimate(prediction: Tensor, latents: Tensor, alpha: Tensor) -> Tensor:
    """The picture that a noise prediction implies."""
    return (latents - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
