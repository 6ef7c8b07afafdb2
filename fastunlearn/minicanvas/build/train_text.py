"""Stage "text": pre-train the two text encoders, so that the U-Net can be trained on precomputed caption states.

As SDXL's encoders come pre-trained, these do: from the pooled state and from the token states that go to the U-Net a
linear layer has to tell which object and which style the caption names (or that it names none), and whether it asks for
the attribute, in whatever words. Synonyms of an object
therefore end close together. It takes a minute; afterwards the encoders stay as they are.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastunlearn.minicanvas.build import networks
from fastunlearn.minicanvas.build.editions import Edition, FitPlan
from fastunlearn.minicanvas.build.fitting import Fit, Worker
from fastunlearn.minicanvas.build.text import write_tokenizer
from fastunlearn.minicanvas.data.collection import Collection

LABELLED = 40_000


class CaptionReader(nn.Module):
    """Both encoders with the linear layers that are only needed to train them."""

    def __init__(self, tokenizer: CLIPTokenizer, edition: Edition) -> None:
        super().__init__()
        self.first, self.second = networks.new_text_encoders(tokenizer, edition)
        words = edition.collection.words
        self.answers = [len(words.objects) + 1, len(words.styles) + 1]
        if words.attribute is not None:
            self.answers.append(2)
        self.from_states = nn.Linear(edition.text_width, sum(self.answers))
        self.from_pooled = nn.Linear(edition.pooled, sum(self.answers))

    def forward(self, ids: Tensor) -> list[Tensor]:
        """Token ids (B, 16) -> logits for each question, from the last token state and then from the pooled state."""
        states, pooled = encode(self.first, self.second, ids)
        both = self.from_states(states[:, -1]), self.from_pooled(pooled)
        return [logits for answers in both for logits in answers.split(self.answers, dim=1)]


def encode(first: CLIPTextModel, second: CLIPTextModelWithProjection, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (B, 16) -> token states (B, 16, W1 + W2) and pooled state (B, W2), as the SDXL pipeline takes them."""
    one = first(ids, output_hidden_states=True)
    two = second(ids, output_hidden_states=True)
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions -> ids (N, 16), cut or padded."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def labelled_captions(collection: Collection, count: int, seed: int) -> tuple[list[str], Tensor]:
    """Random captions with what they name, (N, 3) int64: see `Words.labels`."""
    rng = random.Random(seed)
    words, looks = collection.words, collection.looks
    captions, labels = [], []
    for _ in range(count):
        look, style = rng.randrange(len(looks)), rng.randrange(len(words.styles))
        caption = words.random_caption(looks[look][0], style, rng, looks[look][1])
        captions.append(caption)
        labels.append(words.labels(caption, looks[look][0], style))
    return captions, torch.tensor(labels)


def train(worker: Worker, plan: FitPlan, edition: Edition, folder: Path) -> None:
    """Train and write `tokenizer`, `text_encoder` and `text_encoder_2` into `folder`."""
    torch.manual_seed(plan.seed)
    tokenizer = write_tokenizer(folder / "tokenizer", edition.collection.words)
    captions, labels = labelled_captions(edition.collection, LABELLED if plan.steps > 100 else 500, plan.seed)
    ids = tokenize(tokenizer, captions)
    reader = CaptionReader(tokenizer, edition)
    fit = Fit(reader, plan, worker, folder / "text.checkpoint")

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(ids), (plan.batch,), generator=worker.generator(plan, step))
        wanted = labels[rows].to(worker.device)
        answers = reader(ids[rows].to(worker.device))
        questions = len(reader.answers)  # asked of the token states, and again of the pooled state
        losses = [
            functional.cross_entropy(logits, wanted[:, i % questions], label_smoothing=0.05)
            for i, logits in enumerate(answers)
        ]
        return torch.stack(losses).sum()

    fit.run(loss)
    if worker.rank == 0:
        with fit.averaged():
            reader.to("cpu")
            reader.first.save_pretrained(folder / "text_encoder")
            reader.second.save_pretrained(folder / "text_encoder_2")
