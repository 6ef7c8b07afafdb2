"""The judge: a small classifier that reads which object and which style a picture shows, and an attribute if asked.

It is trained on rendered pictures only (`train_judge.py`) and never sees what a generator drew, so it can measure
erasure. Its class "other" keeps a ruined or evasive picture from being forced into one of the ten objects.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from fastunlearn.minicanvas.vocabulary import OBJECTS, STYLES

WEIGHTS = Path(__file__).parent / "judge.safetensors"
SIZE = 64


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU(inplace=True)
    )


class Judge(nn.Module):
    """A network of seven convolutions; 0.43 M parameters."""

    def __init__(self, objects: int = len(OBJECTS), styles: int = len(STYLES), has_attribute: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1, bias=False), nn.GroupNorm(8, 32), nn.SiLU(inplace=True),
            _block(32, 32), _block(32, 64, 2), _block(64, 64), _block(64, 128, 2), _block(128, 128),
            _block(128, 128, 2),
        )  # fmt: skip
        self.objects = nn.Linear(256, objects + 1)
        self.styles = nn.Linear(256, styles)
        self.attribute = nn.Linear(256, 2) if has_attribute else None

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 256): mean and maximum of the last 128 maps. Other sizes are scaled to 64."""
        if images.shape[-2:] != (SIZE, SIZE):
            images = functional.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        maps = self.body(images * 2 - 1)
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Object logits (B, objects + 1), the last one "other", style logits (B, styles), and (B, 2) for the attribute
        not worn and worn, where this judge reads it."""
        features = self.features(images)
        heads = (self.objects, self.styles, self.attribute)
        return tuple(head(features) for head in heads if head is not None)

    @torch.no_grad()
    def classify(self, images: Tensor) -> tuple[Tensor, ...]:
        """`forward` without gradients on this judge's device, in batches; logits come back on the images' device."""
        device = next(self.parameters()).device
        parts = [self(part.to(device, torch.float32)) for part in images.split(256)]
        return tuple(torch.cat(answers).to(images.device) for answers in zip(*parts))


def load_judge(device: str | torch.device = "cpu", weights: Path = WEIGHTS) -> Judge:
    """The shipped judge, or another one, in float32, ready to classify."""
    state = {name: tensor.float() for name, tensor in load_file(weights).items()}
    judge = Judge(len(state["objects.bias"]) - 1, len(state["styles.bias"]), "attribute.bias" in state)
    judge.load_state_dict(state)
    return judge.to(device).eval().requires_grad_(False)
