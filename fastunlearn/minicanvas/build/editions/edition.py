"""What an edition says: its collection, the widths of its networks, its noise process and its plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastunlearn.minicanvas.data.collection import Collection
from fastunlearn.minicanvas.data.dataset import Recipe


@dataclass(frozen=True)
class FitPlan:
    """One stage of training: `batch` is per process, `ema` the decay of the averaged weights that are kept."""

    name: str
    steps: int
    batch: int
    learning_rate: float
    ema: float
    weight_decay: float = 0.01
    warmup: int = 100
    seed: int = 0
    save_seconds: float = 150.0


@dataclass(frozen=True)
class TextShape:
    """A text encoder."""

    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class UNetShape:
    """The U-Net, per level; cross-attention is in the two lower ones and the middle, as in SDXL."""

    channels: tuple[int, int, int]
    heads: tuple[int, int, int]
    transformer_layers: tuple[int, int, int]


@dataclass(frozen=True)
class Edition:
    """One recipe."""

    name: str
    collection: Collection
    recipes: Mapping[str, Recipe]
    """The data sets, by the name of their file."""
    unet: UNetShape
    text: tuple[TextShape, TextShape]
    scheduler: Mapping[str, object]
    """In which it differs from SDXL's base model."""
    plans: Mapping[str, FitPlan]
    """Of the stages judge, vae, text and unet."""
    look_every: int
    """Updates of the U-Net between two looks at the grid."""
    check_seeds: int
    """Pictures of each cell in the check at the end."""
    nothing_share: float = 0.09
    """Of the captions that are left out. As in SDXL, zeros stand in their place, not the encoded empty caption."""
    vae: Path | None = None
    """One whose encoder is taken as it is, and only its decoder trained further; none: all of it is trained."""
    vae_pictures: str = "pictures_vae"
    """The data set that the autoencoder is trained on."""

    @property
    def text_width(self) -> int:
        """Of the token states that go to the U-Net: those of both encoders, side by side."""
        return sum(shape.width for shape in self.text)

    @property
    def pooled(self) -> int:
        """The width of the pooled state: the second encoder's."""
        return self.text[1].width

    @property
    def cells(self) -> list[tuple[int, int]]:
        """All (look, style) pairs, style by style; the looks are the collection's."""
        words = self.collection.words
        return [(look, style) for style in range(len(words.styles)) for look in range(len(self.collection.looks))]

    def prompt(self, look: int, style: int) -> str:
        """The check's prompt for a cell."""
        thing, worn = self.collection.looks[look]
        return self.collection.words.prompt(thing, style, worn)

    def wanted(self, look: int, style: int) -> tuple[int, ...]:
        """What the judge is to read in a cell: object, style and, where the edition has an attribute, whether worn."""
        thing, worn = self.collection.looks[look]
        return (thing, style, int(worn)) if self.collection.words.attribute is not None else (thing, style)
