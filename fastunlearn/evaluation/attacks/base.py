"""What every attack provides, and what it is handed. Importable without torch, as each attack's file is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import nn

    from fastunlearn.evaluation.attacks.settings import Settings
    from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
    from fastunlearn.models.backbone import Backbone
    from fastunlearn.models.loading import Pipeline

Embed: TypeAlias = Callable[[Sequence[str]], "PromptEmbeds"]


@dataclass(frozen=True)
class Edit:
    """What an attack trains, and how prompts are embedded while it does."""

    parameters: list[nn.Parameter]
    embed: Embed


@dataclass(frozen=True)
class Target:
    """The model under attack."""

    settings: Settings
    backbone: Backbone
    embed: Embed
    """Looks prompts up in the embeddings that the test was prepared with."""
    seed: int
    pipeline: Pipeline | None
    """With the text encoders; None where only the U-Net is attacked."""
    words: Sequence[str]
    """The erased concept's."""


class Attack(ABC):
    """One way to bring a concept back."""

    title: str
    """What is trained."""
    rate_factor: float = 1.0
    """Its usual learning rate, as a multiple of a fine-tune's: what has fewer numbers takes larger steps."""
    learns_words: bool = False
    """Whether the attacker's captions must hold the concept's words."""

    def refuse(self, settings: Settings) -> None:  # noqa: B027 (most refuse nothing)
        """Raise UserError where the settings make no sense for this attack."""

    def facts(self, settings: Settings) -> dict[str, Any]:
        """What relearn.json says of it besides the optimizer."""
        return {}

    @abstractmethod
    def edit(self, target: Target) -> AbstractContextManager[Edit]:
        """What the attack changes, until the block ends; then the model is as before."""
