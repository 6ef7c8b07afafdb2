"""What the baselines share: U-Nets that count their evaluations, a guided sampler, and the interface of a subject.

A plain PyTorch loop. Every prediction that a baseline makes goes through ``Calls``, which counts single samples, the
backward pass where it happens: a graph may be used twice, or not at all.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastunlearn.acceleration.attention import install_attention
from fastunlearn.config import Config
from fastunlearn.denoisers.predictors import Evaluations, Predictors
from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.models.backbone import Backbone
from fastunlearn.models.parameter_names import set_trainable, trainable_names
from fastunlearn.sampling.key_steps import KeyStep
from update.instruments.clock import Clock
from update.subjects.models import backbone_of
from update.subjects.protocol import Whole, watch_models

STEPS = 50
PROMPTS = ["", "the concept", "the anchor"]
UNCOND, CONCEPT, ANCHOR = range(3)


class Calls(Predictors):
    """Student and teacher, counted."""

    def train(self, latents_BCHW: Tensor, timesteps: Tensor, *conditions: PromptEmbeds) -> tuple[Tensor, ...]:
        """The student with a graph; its backward pass is counted by ``backward``."""
        predictions = super().train(latents_BCHW, timesteps, *conditions)
        self.evaluations.student_backward -= len(conditions) * len(latents_BCHW)
        return predictions

    def backward(self, loss: Tensor, samples: int, keep_graph: bool = False) -> None:
        """Go back through the graph of this many samples."""
        self.evaluations.student_backward += samples
        loss.backward(retain_graph=keep_graph)


class Baseline(ABC):
    """One published way to do it, at ``batch`` samples where published with one."""

    NAME: ClassVar[str]
    SUMMARY: ClassVar[str]
    METHOD: ClassVar[str]
    """The trainer's method that does the same."""
    DTYPE: ClassVar[torch.dtype]
    """In which it is published to hold its weights and to compute."""

    def __init__(self, cfg: Config, row: dict[str, str], device: torch.device) -> None:
        """``precision`` "published" is as published; "bf16" computes in bf16, from fp32 weights where those are
        published; "no" is fp32 throughout, and what "auto" means on a CPU."""
        self.kind, self.batch = row["kind"], int(row["batch"])
        precision = row["precision"]
        if precision == "auto":
            precision = "published" if device.type == "cuda" else "no"
        dtype = torch.float32 if precision == "no" else self.DTYPE
        autocast = precision == "bf16" and dtype == torch.float32
        self.backbone = backbone_of(cfg, PROMPTS, device, dtype, autocast=autocast)
        self.device = device
        unet = self.backbone.unet.train()
        install_attention(unet, row["attention"])
        scope = self.scope(self.kind) if row["scope"] == "auto" else row["scope"]
        self.names = trainable_names(unet, scope)
        set_trainable(unet, self.names)
        self.trained = [parameter for name, parameter in unet.named_parameters() if name in set(self.names)]
        teacher = self.make_teacher(unet)
        if row["checkpointing"] == "true":
            unet.enable_gradient_checkpointing()
        self.models = self.make_models(self.backbone, unet, teacher)
        self.backbone.noise.scheduler.set_timesteps(STEPS)
        self.timesteps: list[int] = self.backbone.noise.scheduler.timesteps.tolist()
        self.of_meta = Evaluations()
        self.optimizer = self.make_optimizer()
        self.latents = self.noise(0)

    @classmethod
    @abstractmethod
    def scope(cls, kind: str) -> str:
        """What it trains for a style or an object."""

    @classmethod
    @abstractmethod
    def plan(cls, kind: str) -> list[KeyStep]:
        """The updates of a whole run, as published. ``restart``: whether fresh noise is walked to ``index``."""

    @classmethod
    @abstractmethod
    def stated(cls, step: KeyStep) -> Evaluations:
        """Evaluations of this update for one sample, without the walk to a restart's index."""

    @abstractmethod
    def update(self, step: KeyStep) -> None:
        """One update at a step to which the latents have been brought."""

    @abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer:
        """As published."""

    @classmethod
    def whole(cls, kind: str, batch: int) -> Whole:
        """All updates together: what is stated, and two evaluations for each step of each restart."""
        table = cls.plan(kind)
        restart = sum(2 * step.index for step in table if step.restart)
        total = Evaluations(rollout=restart)
        for step in table:
            for name, count in vars(cls.stated(step)).items():
                setattr(total, name, getattr(total, name) + count)
        return Whole(len(table), Evaluations(**{n: c * batch for n, c in vars(total).items()}), restart * batch, 0)

    def make_teacher(self, unet: nn.Module) -> Any:
        """A second U-Net."""
        return copy.deepcopy(unet).requires_grad_(False).eval()

    def make_models(self, backbone: Backbone, unet: nn.Module, teacher: Any) -> Calls:
        """Who predicts for training, for the sampler, and for the targets."""
        return Calls(backbone, unet, unet, teacher)

    def steps(self) -> Sequence[KeyStep]:
        """The updates."""
        return self.plan(self.kind)

    def restart(self, step: KeyStep, index: int) -> None:
        """Fresh noise, walked through ``index`` guided steps."""
        self.latents = self.noise(step.update)
        for at in range(index):
            self.walk(at)

    def walk(self, index: int) -> None:
        """One guided sampler step: conditional and unconditional in one call."""
        cond, uncond = self.models.rollout(self.latents, self.at(index), self.embeds(CONCEPT), self.embeds(UNCOND))
        guided = uncond + self.guidance * (cond - uncond)
        scheduler = self.backbone.noise.scheduler
        self.latents = scheduler.step(guided, self.timesteps[index], self.latents, return_dict=False)[0]

    def at(self, index: int) -> Tensor:
        """The timestep of a sampler's step, for every sample."""
        return self.backbone.noise.expand(self.timesteps[index], len(self.latents))

    guidance: float = 3.0

    def embeds(self, prompt: int) -> PromptEmbeds:
        """One prompt for the whole batch."""
        return self.backbone.embeds.select([prompt] * self.batch)

    def noise(self, seed: int) -> Tensor:
        """A batch of initial latents."""
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(self.batch, *self.backbone.sample_shape, generator=draw).to(self.device)

    def backward(self, loss: Tensor, samples: int, keep_graph: bool = False) -> None:
        """Watched by the clock."""
        self.models.backward(loss, samples, keep_graph)

    def step(self) -> None:
        """The optimizer's."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def watch(self, clock: Clock) -> None:
        """Its phases."""
        watch_models(self.models, clock)
        clock.watch(self, "restart", "restart")
        clock.watch(self, "walk", "rollout")
        for method, label in (("backward", "backward"), ("step", "optimizer")):
            clock.watch(self, method, label)
