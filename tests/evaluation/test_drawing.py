"""How many images a VAE decodes at a time, counted at its decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastunlearn import cli
from fastunlearn.evaluation.pictures.drawing import generate
from fastunlearn.models.loading import load_pipeline


@pytest.mark.parametrize(
    ("side", "at_a_time", "tiled"), [(64, 3, False), (512, 3, False), (1024, 1, False), (1280, 1, True)]
)
def test_large_images_are_drawn_and_decoded_one_by_one(
    side: int, at_a_time: int, tiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    assert cli.main(["doctor", "--make-random", "tiny-sdxl", str(folder)]) == 0
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.register_to_config(sample_size=side // pipe.vae_scale_factor)
    decoded: list[int] = []
    rows: list[int] = []

    def unet(sample: Tensor, *_: object, **__: object) -> tuple[Tensor]:
        rows.append(len(sample))
        return (torch.zeros_like(sample),)

    def decoder(latents: Tensor, *_: object) -> Tensor:
        decoded.append(len(latents))
        return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

    monkeypatch.setattr(pipe.unet, "forward", unet)
    monkeypatch.setattr(pipe.vae.decoder, "forward", decoder)
    images = generate(pipe, ["cat"] * 3, [0, 1, 2], steps=2)
    assert images.shape == (3, 3, side, side)
    assert set(decoded) == {at_a_time} and set(rows) == {2 * at_a_time}  # guided: two rows an image
    assert pipe.vae.use_tiling is tiled
