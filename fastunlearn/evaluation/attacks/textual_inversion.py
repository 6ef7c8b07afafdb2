"""Textual inversion (arXiv:2208.01618) on the words of the erased concept: new vectors for them, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastunlearn.errors import UserError
from fastunlearn.evaluation.attacks.base import Attack, Edit, Target
from fastunlearn.prompts.variants import UNCONDITIONAL

if TYPE_CHECKING:
    from fastunlearn.evaluation.attacks.settings import Settings
    from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds


class TextualInversion(Attack):
    """The U-Net is not touched."""

    title = "the input embeddings of the concept's words, the U-Net as it is"
    rate_factor = 100.0
    learns_words = True

    def refuse(self, settings: Settings) -> None:
        """Captions without the concept's words."""
        if settings.data != "forbidden" and settings.images is None:
            raise UserError(
                f"--data: {settings.data!r} pictures do not name the erased concept, whose words --attack "
                "'textual-inversion' learns; use 'forbidden'"
            )

    @contextmanager
    def edit(self, target: Target) -> Iterator[Edit]:
        """Prompts are encoded anew in every step, through the vectors that are trained."""
        from fastunlearn.evaluation.attacks.learned_words import learned_words
        from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
        from fastunlearn.models.parameter_names import set_trainable

        if target.pipeline is None:
            raise ValueError("textual inversion needs the pipeline, for its text encoders")
        set_trainable(target.backbone.unet, [])
        like = target.backbone.embeds.hidden
        with learned_words(target.pipeline, target.words, like.device) as (vectors, encode):

            def learned(prompts: Sequence[str]) -> PromptEmbeds:
                parts = [target.embed([text]) if text == UNCONDITIONAL else encode(text) for text in prompts]
                return PromptEmbeds.cat([part.to(like.device, like.dtype) for part in parts])

            yield Edit(vectors, learned)


TEXTUAL_INVERSION = TextualInversion()
