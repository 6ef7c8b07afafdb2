"""Stage "text": pre-train the two text encoders, so that the U-Net can be trained on precomputed caption states.

As SDXL's encoders come pre-trained, these do: from the pooled state and from the token states that go to the U-Net a
linear layer has to tell which object and which style the caption names (or that it names none). Synonyms of an object
therefore end close together. It takes a minute; afterwards the encoders stay as they are.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastunlearn.minicanvas import vocabulary
from fastunlearn.minicanvas.build import networks
from fastunlearn.minicanvas.build.fitting import Fit, FitPlan, Worker
from fastunlearn.minicanvas.build.text import write_tokenizer

PLAN = FitPlan("text", steps=1500, batch=64, learning_rate=2e-3, ema=0.995, seed=31)
LABELLED = 40_000


class CaptionReader(nn.Module):
    """Both encoders with the linear layers that are only needed to train them."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.first, self.second = networks.new_text_encoders(tokenizer)
        answers = len(vocabulary.OBJECTS) + len(vocabulary.STYLES) + 2
        self.from_states = nn.Linear(96, answers)
        self.from_pooled = nn.Linear(networks.POOLED, answers)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, 16) -> answers (B, 20) from the last token state and from the pooled state."""
        states, pooled = encode(self.first, self.second, ids)
        return self.from_states(states[:, -1]), self.from_pooled(pooled)


def encode(first: CLIPTextModel, second: CLIPTextModelWithProjection, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (B, 16) -> token states (B, 16, 96) and pooled state (B, 64), as the SDXL pipeline takes them."""
    one = first(ids, output_hidden_states=True)
    two = second(ids, output_hidden_states=True)
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions -> ids (N, 16), cut or padded."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def labelled_captions(count: int, seed: int) -> tuple[list[str], Tensor]:
    """Random captions with what they name: (N, 2) int64, object and style, the last label of each meaning "none"."""
    rng = random.Random(seed)
    names = {word: i for i, thing in enumerate(vocabulary.OBJECTS) for word in (thing, *vocabulary.SYNONYMS[thing])}
    captions, labels = [], []
    for _ in range(count):
        thing, style = rng.randrange(len(vocabulary.OBJECTS)), rng.randrange(len(vocabulary.STYLES))
        caption = vocabulary.random_caption(thing, style, rng)
        named = any(name in caption for name, i in names.items() if i == thing)
        styled = vocabulary.STYLES[style] in caption.replace(",", "").split()
        captions.append(caption)
        labels.append((thing if named else len(vocabulary.OBJECTS), style if styled else len(vocabulary.STYLES)))
    return captions, torch.tensor(labels)


def train(worker: Worker, plan: FitPlan, folder: Path) -> None:
    """Train and write `tokenizer`, `text_encoder` and `text_encoder_2` into `folder`."""
    torch.manual_seed(plan.seed)
    tokenizer = write_tokenizer(folder / "tokenizer")
    captions, labels = labelled_captions(LABELLED if plan.steps > 100 else 500, plan.seed)
    ids = tokenize(tokenizer, captions)
    reader = CaptionReader(tokenizer)
    fit = Fit(reader, plan, worker, folder / "text.checkpoint")
    split = len(vocabulary.OBJECTS) + 1

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(ids), (plan.batch,), generator=worker.generator(plan, step))
        wanted = labels[rows].to(worker.device)
        total = torch.zeros((), device=worker.device)
        for answers in reader(ids[rows].to(worker.device)):
            total = total + functional.cross_entropy(answers[:, :split], wanted[:, 0], label_smoothing=0.05)
            total = total + functional.cross_entropy(answers[:, split:], wanted[:, 1], label_smoothing=0.05)
        return total

    fit.run(loss)
    if worker.rank == 0:
        with fit.averaged():
            reader.to("cpu")
            reader.first.save_pretrained(folder / "text_encoder")
            reader.second.save_pretrained(folder / "text_encoder_2")
