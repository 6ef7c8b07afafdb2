"""The tokenizer of the embedded model: a `CLIPTokenizer` whose few hundred entries are the words of its captions.

Like CLIP's it is a byte-pair encoding, so that any text can be written with it: letters are the fallback, and every
known word is one entry.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from fastunlearn.minicanvas.build.networks import TEXT_LENGTH
from fastunlearn.minicanvas.vocabulary import WORDS
from fastunlearn.minicanvas.words import Words

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'!?-&+:;()/\"#%*@_"


def write_tokenizer(folder: Path, words: Words = WORDS) -> CLIPTokenizer:
    """Build the tokenizer from the captions' words, write it to `folder` and give it back."""
    entries_wanted = sorted({word.strip(",") for caption in words.all_captions() for word in caption.split()} - {""})
    start = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    model = Tokenizer(BPE())
    # Asked for more entries than there can be, the trainer goes on until every known word is one entry.
    trainer = BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        initial_alphabet=list(LETTERS),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    model.train_from_iterator(entries_wanted, trainer)
    learned = json.loads(model.to_str())["model"]["merges"]
    entries = [*start, *(left + right for left, right in learned), START, END]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    folder.mkdir(parents=True, exist_ok=True)
    _write_files(folder, vocabulary, learned)
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=TEXT_LENGTH,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_vocabulary(folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` beside the `tokenizer.json` of `folder`, with what that holds.

    Versions of transformers before 5 read these two, and nothing else, for a `CLIPTokenizer`.
    """
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    _write_files(folder, model["vocab"], model["merges"])


def _write_files(folder: Path, vocabulary: dict[str, int], merges: list[list[str]]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
