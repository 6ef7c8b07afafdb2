"""What every erasure method provides: facts about itself, its updates, and its loss.

The facts (``MethodSpec``) are read before torch is loaded, by the configuration, the planner and ``--help``; so the
file of a method imports torch and the kernels only inside functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from fastunlearn.errors import UserError
from fastunlearn.sampling.batch import Augmentation, GuidedPrediction, UnlearnBatch
from fastunlearn.sampling.key_steps import KeyStep, uniform_table
from fastunlearn.schema.fields import ConfigModel, Scope

if TYPE_CHECKING:
    from torch import Tensor

    from fastunlearn.config import Config
    from fastunlearn.denoisers.predictors import Predictors


class UNetCalls(NamedTuple):
    """Single-sample calls of the U-Net for each sample of a micro-batch."""

    teacher: int = 0
    """Of the frozen model."""
    trained: int = 1
    """Of the student, recorded for the backward pass."""
    own_target: int = 0
    """Of the student without a gradient, as its own target."""
    beside: int = 0
    """Without a gradient, while the student's graph waits: the sampler's share, or the discriminator's."""


class AnchorTimesteps(NamedTuple):
    """At which timesteps pictures of the anchors are noised."""

    uniform: bool
    """All of the noise schedule from ``minimum`` on; else the sampler's from the key step on."""
    minimum: int = 0


class MethodSpec:
    """The facts of one method. A file in ``methods/`` overrides what is not as it stands here."""

    title: str
    """As the model card calls it."""
    paper: str
    """The arXiv number."""
    Settings: type[ConfigModel] | None = None
    """The section of the configuration that is named after the method."""
    steps: int = 0
    """Updates where none are asked for."""
    scope: Scope = "attn2"
    """What is trained where nothing is asked for."""
    samples: Literal["trajectories", "anchors", "none"] = "trajectories"
    """Where it trains: on trajectories of the student, on noised pictures of the anchors, or nowhere."""
    closed_form: bool = False
    """Whether it edits the U-Net in one step before any training; it has then no loss."""
    asks_teacher: bool = True
    """Whether its own loss needs the frozen model."""
    always_retains: bool = False
    """Whether it uses surgery without being asked to."""
    retain_source: Literal["generated", "anchors"] = "generated"
    """``retain.source`` "auto"."""
    retain_timesteps: Literal["key", "uniform"] = "key"
    """``retain.timesteps`` "auto"."""

    @property
    def card_title(self) -> str:
        """Title and paper."""
        return f"{self.title} (arXiv:{self.paper})"

    def default_steps(self, cfg: Config) -> int:
        """Updates where ``train.max_train_steps`` is left open."""
        return self.steps

    def default_scope(self, cfg: Config) -> str:
        """What ``train.scope`` "auto" stands for.

        Raises:
            UserError: it is ambiguous.
        """
        return self.scope

    def first_student_update(self, cfg: Config) -> int:
        """The first update that changes the model."""
        return 0

    def calls(self, cfg: Config) -> UNetCalls:
        """U-Net calls of one micro-batch."""
        return UNetCalls(teacher=2)

    def refuse(self, cfg: Config) -> None:
        """Refuse a configuration that has no meaning for the method.

        Raises:
            UserError: names the field and the remedy.
        """

    def anchor_timesteps(self, cfg: Config) -> AnchorTimesteps:
        """Where ``samples`` is "anchors"."""
        return AnchorTimesteps(uniform=True)

    def average(self, cfg: Config) -> tuple[float, bool] | None:
        """(decay, with a warm-up) of the exponential average of the weights that walks the trajectories and is shipped;
        None: there is none."""
        return None

    def stops_first_token_gradient(self, cfg: Config) -> bool:
        """Whether no gradient goes through the keys and values of the first token."""
        return False

    def edit_rows(self, cfg: Config, prompts: int, tokens: int, width: int) -> list[tuple[str, int]]:
        """(name, bytes on the device) of what an edit in closed form holds beside one projection; ``prompts`` of
        ``tokens`` tokens each enter, ``width`` wide."""
        return []

    def facts(self, cfg: Config) -> list[tuple[str, str]]:
        """Rows of the model card that only this method has."""
        return []

    def memory_rows(self, cfg: Config, latent_channels: int, latent_size: int) -> list[tuple[str, int]]:
        """(name, bytes on the device) of what the method itself holds during training."""
        return []


@dataclass
class MethodOutput:
    """A micro-batch's loss (fp32 scalar, with graph; None where only the method's own parts learn), and the guided
    prediction if the trajectory continues."""

    loss: Tensor | None
    guided: GuidedPrediction | None


class Method(ABC):
    """One erasure method. Built from the configuration, before any model is loaded."""

    spec: ClassVar[MethodSpec]

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def table(self) -> list[KeyStep]:
        """The ordered updates of the run. By default one fresh trajectory each, stopped at a uniformly drawn step."""
        cfg = self.cfg
        return uniform_table(len(cfg.concepts), cfg.sampler.num_inference_steps, cfg.max_train_steps, cfg.seed)

    @abstractmethod
    def loss(self, models: Predictors, batch: UnlearnBatch) -> MethodOutput:
        """The loss of one micro-batch."""

    def finish(self) -> dict[str, Tensor]:
        """After the student's step: what the method itself has to learn; returns figures for the log. Collective."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs of the method itself."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state of its own")

    def augmentation(self, step: KeyStep) -> Augmentation | None:
        """Whether this update trains on an augmented prompt. By default never."""
        return None

    def edit(self, pipeline: Any, device: Any) -> dict[str, Tensor]:
        """In closed form: the changed tensors of a loaded pipeline's U-Net, fp32 on the host."""
        return {}


class KindDefaults(NamedTuple):
    """A method's settings for one kind of concept."""

    start: int
    """First trained sampler index on a 50-step scale."""
    steps: int
    steps_for_several: int
    """Updates for more than one concept."""
    scope: Scope


class ByKind(MethodSpec):
    """A method whose defaults depend on the kind of the concepts."""

    kinds: Mapping[str, KindDefaults]

    def default_steps(self, cfg: Config) -> int:
        """The largest default among the concepts."""
        rows = [self.kinds[cfg.kind_of(concept)] for concept in cfg.concepts]
        return max(row.steps if len(rows) == 1 else row.steps_for_several for row in rows)

    def default_scope(self, cfg: Config) -> str:
        """That of the concepts' kinds, which must agree."""
        scopes = {concept.name: self.kinds[cfg.kind_of(concept)].scope for concept in cfg.concepts}
        if len(set(scopes.values())) > 1:
            listing = ", ".join(f"{name!r} {scope}" for name, scope in scopes.items())
            raise UserError(
                f"train.scope: 'auto' is ambiguous, the concepts want different scopes ({listing}); "
                "set train.scope, or erase them in separate runs"
            )
        return next(iter(scopes.values()))


def frozen_predictions(models: Predictors, batch: UnlearnBatch, *conditions: str) -> tuple[Tensor, ...]:
    """The frozen model's predictions at a batch's conditions ("cond", "anchor", "uncond"), made now or long ago."""
    if batch.targets is not None:
        return tuple(batch.targets[name] for name in conditions)
    return models.frozen(batch.latents, batch.timesteps, *(getattr(batch, name) for name in conditions))


def guided_prediction(
    models: Predictors, batch: UnlearnBatch, cond: Tensor | None, uncond: Tensor | None
) -> GuidedPrediction | None:
    """The predictions that advance a trajectory, from what is at hand where possible.

    ``cond`` and ``uncond`` are the student's predictions at the batch's own prompt and at the unconditional one, or
    None where training did not make them; what is missing is evaluated without a gradient, in one call.
    """
    if not batch.advance:
        return None
    if cond is None and uncond is None:
        return GuidedPrediction(*models.rollout(batch.latents, batch.timesteps, batch.cond, batch.uncond))
    if uncond is None:
        (uncond,) = models.rollout(batch.latents, batch.timesteps, batch.uncond)
    if cond is None:
        (cond,) = models.rollout(batch.latents, batch.timesteps, batch.cond)
    return GuidedPrediction(cond.detach(), uncond.detach())


def no_loss(parameters: Any) -> Tensor:
    """A loss of zero, fp32, whose gradient is zero for each of the parameters: for an update without a method's own."""
    import torch

    return torch.stack([(parameter * 0).sum().float() for parameter in parameters]).sum()
