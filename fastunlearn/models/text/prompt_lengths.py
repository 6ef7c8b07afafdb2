"""Prompts against what the text encoders read: tokens behind the last one are lost, and with them perhaps the concept.

CLIP reads 77 tokens, start and end among them. What two prompts have in common up to there is all that a training sees.
Asks the tokenizers alone, so it comes before any weights are loaded.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastunlearn.config import Config
from fastunlearn.config.base import named_concepts
from fastunlearn.config.run_prompts import folder_captions, meta_texts, retain_prompts
from fastunlearn.errors import UserError
from fastunlearn.models.architectures.base import END
from fastunlearn.models.architectures.unet2d import TEXT_LENGTH
from fastunlearn.models.formats.folder_configs import write_tokenizer
from fastunlearn.models.loading import local_model
from fastunlearn.prompts.variants import concept_variants
from fastunlearn.schema.sections import ModelConfig
from fastunlearn.utils.text import without_style

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

NAMED = 60


def load_tokenizers(model: ModelConfig) -> list[CLIPTokenizer]:
    """Those of a model, one for each text encoder; a single file has CLIP's, which all of its kind share.

    Raises:
        UserError: the model is not there, or one of its tokenizers cannot be read.
    """
    from transformers import CLIPTokenizer

    place = local_model(model)
    with tempfile.TemporaryDirectory() as written:
        if place.is_file():
            write_tokenizer(Path(written), END)
            folders = [Path(written)]
        else:
            folders = [folder for name in ("tokenizer", "tokenizer_2") if (folder := place / name).is_dir()]
        try:
            return [CLIPTokenizer.from_pretrained(str(folder), local_files_only=True) for folder in folders]
        except Exception as error:  # whatever a damaged vocabulary provokes
            raise UserError(
                f"model.pretrained_model_name_or_path: {model.pretrained_model_name_or_path!r}: its tokenizer cannot "
                f"be read ({type(error).__name__})"
            ) from None


def check_words(cfg: Config) -> str | None:
    """Refuse concepts that the text encoders do not get to see; a sentence on other prompts that are cut, if any.

    Raises:
        UserError: as ``load_tokenizers`` and ``check_prompts``.
    """
    tokenizers = load_tokenizers(cfg.model)
    check_prompts(cfg, tokenizers)
    return cut_prompts(other_prompts(cfg), tokenizers)


def check_prompts(cfg: Config, tokenizers: Sequence[CLIPTokenizer]) -> None:
    """Refuse concepts that the text encoders do not get to see, or that read like their anchors.

    Raises:
        UserError: names the concept and the prompt.
    """
    for concept in named_concepts(cfg):
        for pair in concept_variants(concept, cfg.prompts):
            shown = repr(pair.prompt if len(pair.prompt) <= NAMED else pair.prompt[:NAMED] + "...")
            for tokenizer in tokenizers:
                if _is_cut(tokenizer, pair.prompt, concept.name):
                    raise UserError(
                        f"prompts.templates: in {shown} the concept {concept.name!r} stands behind the "
                        f"{limit(tokenizer)} tokens that the text encoder reads, so nothing would be erased; use a "
                        "shorter prompt"
                    )
                if _seen(tokenizer, pair.prompt) == _seen(tokenizer, pair.anchor):
                    raise UserError(
                        f"concepts: the text encoder reads {shown} and its anchor {pair.anchor[:NAMED]!r} as the same "
                        f"tokens, so there is nothing to erase of {concept.name!r}; choose another anchor"
                    )


def other_prompts(cfg: Config) -> list[str]:
    """What else a run asks for: prompts of what is kept, of the meta term, of the closing pictures."""
    texts = [*meta_texts(cfg), *cfg.report.validation_prompts]
    if cfg.retains and not cfg.chooses_neighbours:  # whose names are short
        texts += [text for _, text in folder_captions(cfg)] if cfg.retain_source == "folder" else retain_prompts(cfg)
    return texts


def cut_prompts(prompts: Iterable[str], tokenizers: Sequence[CLIPTokenizer]) -> str | None:
    """A sentence on the prompts whose ends are not read; None: all are read to their ends."""
    cut = [text for text in dict.fromkeys(prompts) if any(_length(t, text) > limit(t) for t in tokenizers)]
    if not cut:
        return None
    count = "1 prompt is" if len(cut) == 1 else f"{len(cut)} prompts are"
    return f"{count} longer than the text encoder reads, and cut: {cut[0][:NAMED]!r} ..."


def limit(tokenizer: CLIPTokenizer) -> int:
    """Tokens that its text encoder reads, start and end among them."""
    return min(int(tokenizer.model_max_length), TEXT_LENGTH)


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, verbose=False).input_ids)


def _seen(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, truncation=True, max_length=limit(tokenizer)).input_ids


def _is_cut(tokenizer: Any, prompt: str, concept: str) -> bool:
    """Whether the first mention of the concept is not read to its end."""
    for name in (concept, without_style(concept)):
        word = re.escape(name)
        # As a word of its own, or else within one: "cats", but not the one in "vacation".
        found = re.search(rf"(?<!\w){word}(?!\w)", prompt, re.IGNORECASE) or re.search(word, prompt, re.IGNORECASE)
        if found is not None:
            return _length(tokenizer, prompt[: found.end()]) > limit(tokenizer)
    return False
