"""Stage "assemble": put the trained parts together as a diffusers SDXL pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastunlearn.minicanvas.build import networks
from fastunlearn.minicanvas.build.editions import CANVAS, Edition
from fastunlearn.minicanvas.build.text import write_vocabulary


def make_pipeline(
    folder: Path, unet: UNet2DConditionModel | None = None, edition: Edition = CANVAS
) -> StableDiffusionXLPipeline:
    """A float32 pipeline of the parts in `folder` (vae, tokenizer, text_encoder, text_encoder_2, unet unless given).

    As in SDXL, zeros stand for an empty prompt, and the scheduler is Euler's.
    """
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet or UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True),
        scheduler=EulerDiscreteScheduler.from_config(networks.new_scheduler(edition).config),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def write_pipeline(pipe: StableDiffusionXLPipeline, output: Path) -> None:
    """Save in float16 safetensors beside `output` and rename; `pipe` is left in float16.

    The text encoders' configurations ask for float32 when nothing else is asked for: transformers would load what it
    finds in the file, float16, and the float32 U-Net that diffusers makes of the same file could not take its output.
    """
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(partial, safe_serialization=True)
    for part in ("tokenizer", "tokenizer_2"):
        write_vocabulary(partial / part)
    for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
        path = partial / part / "config.json"
        settings = json.loads(path.read_text()) | ({"dtype": "float32"} if part.startswith("text") else {})
        settings.pop("_name_or_path", None)  # the folder of this build means nothing elsewhere
        path.write_text(json.dumps(settings, indent=2) + "\n")
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)
