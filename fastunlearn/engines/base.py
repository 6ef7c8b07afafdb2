"""What an engine is to the trainer, and the facts that each states about itself.

The trainer makes losses; the engine turns them into new weights. Rounding, clipping and the refusal of what is not
finite belong to it, so that no line of the trainer asks which engine it has. The file of a spec is importable without
torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastunlearn.schema.fields import ConfigModel

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastunlearn.config import Config
    from fastunlearn.gradients.guard import FiniteGuard
    from fastunlearn.gradients.shard import GradientKind
    from fastunlearn.gradients.stats import SurgeryStats
    from fastunlearn.utils.distributed import World
    from fastunlearn.utils.memory_rows import Row, Sizes


class EngineSpec:
    """The facts of one engine."""

    name: str
    Settings: type[ConfigModel] | None = None
    """The section of the configuration that is named after the engine."""
    shards: bool = False
    """Whether more ranks make each of them hold less."""
    has_surgery: bool = True
    """Whether a gradient can be put aside and another be changed by it."""

    def title(self, cfg: Config) -> str:
        """As the run's first line and the plan call it."""
        raise NotImplementedError

    def stage(self, cfg: Config) -> int:
        """The ZeRO stage: what is sharded; 0: nothing."""
        return 0

    def holds_bf16(self, cfg: Config) -> bool:
        """Whether the U-Net can be held in bf16, since the digits that a step would lose are kept or made up for."""
        raise NotImplementedError

    def needs_process_group(self, cfg: Config) -> bool:
        """Whether a single rank, too, needs one."""
        return True

    def refuse(self, cfg: Config) -> None:
        """Refuse what the engine cannot do.

        Raises:
            UserError: the first rule that is broken.
        """

    def refuse_ranks(self, cfg: Config, world_size: int) -> None:
        """Refuse more ranks than the engine has.

        Raises:
            UserError: with the remedy.
        """

    def build(self, unet: nn.Module, cfg: Config, world: World, originals: Mapping[str, Tensor]) -> Engine:
        """Put the parameters of ``unet`` that require a gradient under the engine. ``originals``: those tensors before
        any cast."""
        raise NotImplementedError

    def memory_rows(self, cfg: Config, sizes: Sizes, world_size: int) -> list[Row]:
        """What the rank that needs most holds, but for activations."""
        raise NotImplementedError

    def gradients_of_one_pass(self, cfg: Config, sizes: Sizes, world_size: int) -> int:
        """Bytes of gradients that one backward pass makes from nothing and keeps, one weight after the other; 0 where
        less than all of them are kept, or nobody knows which come first."""
        return 0

    def offload(self, cfg: Config) -> Sequence[tuple[str, Any]]:
        """Fields that would move the optimizer's moments to the host; none where they are there already."""
        return ()

    def more_ranks(self, cfg: Config, world_size: int) -> Sequence[tuple[int, int]]:
        """(stage, ranks) that would make each rank hold less."""
        return ()

    def instead(self, cfg: Config, world_size: int) -> Sequence[tuple[str, Any]]:
        """Fields with which this engine takes the place of another that is configured; none where it cannot."""
        return ()


@dataclass(frozen=True)
class Applied:
    """What became of an update's gradient."""

    stepped: bool
    """False where it was skipped, since something was not finite."""
    projection: SurgeryStats | None = None
    """What the projection saw, where there is one."""


@dataclass(frozen=True)
class ExportedWeights:
    """What a run has changed, fp32 on the host: what was trained, and what an edit in closed form changed before."""

    trained: dict[str, Tensor]
    edited: Mapping[str, Tensor] = field(default_factory=dict)
    rounded: bool = False
    """Whether the training started from bf16 copies: what it changed is then added to what those were made from."""

    def restored(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All changed tensors in fp32. A tensor that training left alone comes out exactly as it went in.

        ``base``: the original model's, as stored; what was edited takes its place, as the training started from it.
        """
        if not self.rounded:
            return {**self.edited, **self.trained}
        found = dict(self.edited)
        for name, weight in self.trained.items():
            start = (self.edited[name] if name in self.edited else base[name]).detach().float().cpu()
            found[name] = start + (weight - start.bfloat16().float())
        return found


class Engine(ABC):
    """The student U-Net under an engine. Call it like the U-Net."""

    named: Mapping[str, nn.Parameter]
    """What is trained."""
    guard: FiniteGuard
    """Stands before every step, and counts those that it refused."""

    @property
    @abstractmethod
    def sampler(self) -> nn.Module:
        """The same weights for calls without a gradient, of which the engine keeps no count."""

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """The rate of the next update."""

    @property
    @abstractmethod
    def grad_norm(self) -> Tensor | float | None:
        """Global norm of the last update's gradient, before clipping; None where it was skipped."""

    @property
    @abstractmethod
    def projected_segments(self) -> Sequence[str] | None:
        """What the rows of the projection's table stand for; None without a projection."""

    @abstractmethod
    def __call__(self, *args: Tensor, **kwargs: object) -> tuple[Tensor, ...]:
        """A recorded forward pass."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """The gradient of one micro-batch; after the ``last`` one of a window, ``apply`` or the end of
        ``capture_gradient`` finds their mean."""

    @abstractmethod
    def capture_gradient(self, kind: GradientKind) -> AbstractContextManager[None]:
        """Inside, gradients are stored for later instead of applied."""

    @abstractmethod
    def apply(self) -> Applied:
        """Transform the window's gradient, refuse it where it is not finite, else step. Collective.

        Raises:
            UserError: too many updates in a row were not finite.
        """

    @abstractmethod
    def export_weights(self) -> ExportedWeights:
        """The trained parameters in fp32 on the host. Collective: every rank must call it."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write this rank's part of weights and optimizer. Collective; every rank comes back from it.

        Raises:
            UserError: this rank could not write its part.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote, from files of which nothing may be executed. Collective.

        Raises:
            Exception: of any kind, where the files do not hold such a state; the caller says so.
        """

    def state_dict(self) -> dict[str, Any]:
        """What else the next update needs of this rank, beside what ``save`` writes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from it."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state beside its own files")
