"""A classifier that looks at a probe's pictures, where one is asked for: the only use of a VAE while a run trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastunlearn.errors import UserError
from fastunlearn.registry import CLASSIFIERS

if TYPE_CHECKING:
    from fastunlearn.config import Config


class Eyes:
    """The classifier of ``progress.classifier`` with the VAE that makes pictures of latents for it."""

    def __init__(self, cfg: Config, vae: Any, device: torch.device) -> None:
        self._identity = cfg.vocabulary.identity
        self._names = [self._identity(concept.name) for concept in cfg.concepts]
        self._vae = vae.to(device)
        self._classifier = CLASSIFIERS[cfg.progress.classifier].load(str(device))

    @torch.no_grad()
    def sees(self, latents: Tensor, concept: int) -> list[bool]:
        """Whether each picture, of latents (B, C, H, W), shows the concept."""
        images = self._vae.decode(latents.to(self._vae.dtype) / self._vae.config.scaling_factor).sample
        labels = self._classifier.look((images.float() / 2 + 0.5).clamp(0, 1))
        name = self._names[concept]
        return [name in (self._identity(label.object), self._identity(label.style)) for label in labels]


def check_classifier(cfg: Config) -> None:
    """Refuse one that does not know the model or its concepts.

    Raises:
        UserError: with its reason.
    """
    name = cfg.progress.classifier
    if not cfg.progress.enabled or name == "none":
        return
    reason = CLASSIFIERS[name].why_not(cfg)
    if reason is not None:
        raise UserError(f"progress.classifier: {name!r} cannot look at this run: {reason}; use 'none'")


def open_eyes(cfg: Config, pipeline: Any, device: torch.device) -> Eyes | None:
    """None where nobody is asked to look."""
    return None if not cfg.progress.enabled or cfg.progress.classifier == "none" else Eyes(cfg, pipeline.vae, device)
