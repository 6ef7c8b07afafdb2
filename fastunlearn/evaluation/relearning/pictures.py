"""The pictures of an attack, as latents: drawn once by the original model, or a folder's, encoded once.

Pools, and their cache. They do not depend on the attack's seed, its steps or the erased model, so all
attacks on models of the same base share them; the cache's folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastunlearn.config import Config
from fastunlearn.denoisers.predictors import Predictors
from fastunlearn.errors import UserError
from fastunlearn.models.backbone import Backbone
from fastunlearn.prompts.variants import UNCONDITIONAL, PromptTable
from fastunlearn.sampling.image_pool import LatentPool, generate_pool
from fastunlearn.utils.files import atomic_file, cache_folder
from fastunlearn.utils.foreign import parse_json

ATTACK_SEED, HELD_OUT_SEED = 1001, 2002  # of the drawings; the run's own seed makes the pictures it keeps


class Pictures:
    """Draws pools with the U-Net as it is when this is made, the original."""

    def __init__(self, cfg: Config, backbone: Backbone, prompt_table: PromptTable) -> None:
        self.cfg, self.backbone, self.prompt_table = cfg, backbone, prompt_table
        self._model = _digest_of(backbone)

    def drawn(self, prompts: Sequence[str], number: int, seed: int) -> LatentPool:
        """``number`` pictures; the prompts take turns. From the cache where they are there."""
        file = self.file(prompts, number, seed)
        pool = _read(file, self.backbone)
        if pool is None:
            retain = self.cfg.retain.model_copy(
                update={"num_images": number, "batch_size": self.cfg.evaluation.batch_size}
            )
            cfg = self.cfg.model_copy(update={"retain": retain, "seed": seed})
            unet = self.backbone.unet
            pool = generate_pool(cfg, Predictors(self.backbone, unet, unet, unet), self.prompt_table, prompts)
            _write(file, pool)
        return pool

    def file(self, prompts: Sequence[str], number: int, seed: int) -> Path:
        """Where they are kept: named by everything that they depend on."""
        key = hashlib.blake2b(self._model.encode(), digest_size=16)
        rows = self.backbone.embeds.select([self.prompt_table.index[text] for text in (*prompts, UNCONDITIONAL)])
        for tensor in (rows.hidden, rows.pooled):
            if tensor is not None:
                key.update(_bytes(tensor))
        retain = self.cfg.retain
        how = [retain.num_inference_steps, retain.guidance_scale, list(prompts), number, seed]
        key.update(json.dumps(how).encode())
        return cache_folder() / f"pictures-{key.hexdigest()}.safetensors"

    def evaluations(self, prompts: Sequence[str], number: int, seed: int) -> int:
        """U-Net evaluations that drawing them will take; 0 where they are there."""
        there = _read(self.file(prompts, number, seed), self.backbone) is not None
        return 0 if there else 2 * number * self.cfg.retain.num_inference_steps


def _digest_of(backbone: Backbone) -> str:
    key = hashlib.blake2b(f"{torch.__version__} {backbone.noise.prediction_type} {backbone.sample_shape}".encode())
    for name, tensor in backbone.unet.state_dict().items():
        key.update(name.encode() + _bytes(tensor))
    key.update(_bytes(backbone.noise.alphas_cumprod))
    for tensor in backbone.fixed_inputs.values():
        key.update(_bytes(tensor))
    return f"{key.hexdigest()} {backbone.embeds.hidden.device.type} {backbone.autocast}"


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def _read(file: Path, backbone: Backbone) -> LatentPool | None:
    try:
        with safe_open(file, framework="pt") as opened:
            prompts = parse_json(opened.metadata()["prompts"])
            latents = opened.get_tensor("latents")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    texts = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
    if not texts or latents.shape != (len(prompts), *backbone.sample_shape) or not torch.isfinite(latents).all():
        return None
    return LatentPool(latents.to(backbone.embeds.hidden.device), prompts)


def _write(file: Path, pool: LatentPool) -> None:
    # Only a shortcut: a home that cannot be written costs time, not the test.
    with suppress(UserError), atomic_file(file) as partial:
        save_file({"latents": pool.latents.cpu().contiguous()}, partial, {"prompts": json.dumps(pool.prompts)})
