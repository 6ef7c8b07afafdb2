"""Writing what a diffusers folder says about a model, without its weights: configurations and tokenizers.

For a single file, which does not say it, and for models with random weights. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from fastunlearn.models.architectures.base import END, START, PublicModel
from fastunlearn.models.architectures.unet2d import TEXT_LENGTH
from fastunlearn.registry import ARCHITECTURES

VOCABULARY = Path(__file__).parent / "clip_vocabulary" / "merges.txt"
_MODELS = [pair for architecture in ARCHITECTURES.values() for pair in architecture.models.items()]
# The published ones first.
PUBLIC_MODELS: dict[str, PublicModel] = dict(sorted(_MODELS, key=lambda pair: pair[0].startswith("tiny-")))


def write_configs(model: PublicModel, folder: Path) -> None:
    """Write everything of a diffusers folder but the weights: configurations and tokenizers."""
    from diffusers import __version__ as diffusers_version

    version = {"_diffusers_version": diffusers_version}
    index: dict[str, Any] = {"_class_name": model.pipeline, **version}
    for name, content in (("unet", model.unet), ("vae", model.vae)):
        index[name] = ["diffusers", content["_class_name"]]
        _write_json(folder / name / "config.json", {**content, **version})
    index["scheduler"] = ["diffusers", model.scheduler["_class_name"]]
    _write_json(folder / "scheduler" / "scheduler_config.json", {**model.scheduler, **version})
    for encoder in model.adapter.text_encoders:
        index[encoder.name] = ["transformers", encoder.class_name]
        content = {"architectures": [encoder.class_name], **getattr(model, encoder.name)}
        _write_json(folder / encoder.name / "config.json", content)
        index[encoder.tokenizer] = ["transformers", "CLIPTokenizer"]
        write_tokenizer(folder / encoder.tokenizer, encoder.padding)
    _write_json(folder / "model_index.json", index | dict(model.adapter.index))


def write_tokenizer(folder: Path, padding: str) -> None:
    """CLIP's tokenizer, as transformers reads it."""
    merges = VOCABULARY.read_text(encoding="utf-8")
    _write_json(folder / "vocab.json", clip_vocabulary(merges))
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END, "unk_token": END,
            "pad_token": padding, "model_max_length": TEXT_LENGTH, "do_lower_case": True, "add_prefix_space": False,
        },
    )  # fmt: skip


def clip_vocabulary(merges: str) -> dict[str, int]:
    """Entry -> number: the 256 bytes, the same at the end of a word, one entry per merge, start and end of the text."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = range(256 - len(shown))  # spaces and controls, which a text file cannot show, are written as letters
    letters = [chr(byte) for byte in shown] + [chr(256 + i) for i in hidden]
    joined = ["".join(line.split()) for line in merges.splitlines()[1:]]
    entries = [*letters, *(f"{letter}</w>" for letter in letters), *joined, START, END]
    return {entry: number for number, entry in enumerate(entries)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(deepcopy(dict(content)), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
