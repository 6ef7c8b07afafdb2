"""What a run leaves for others: the U-Net in diffusers format, the delta file, the before/after picture, the card.

What this is: the weights, written and read here, and the one place from which the writers of the picture (`samples.py`)
and of the model card (`card.py`) are imported. Each replaces the old content in one step (`files.py`).
What this is not: metrics.json or checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastunlearn.errors import UserError
from fastunlearn.export.card import write_card
from fastunlearn.export.samples import before_after, before_after_grid, choose_validation_rows
from fastunlearn.utils.files import atomic_file, atomic_folder
from fastunlearn.utils.text import first_line

if TYPE_CHECKING:
    from fastunlearn.config import Config

__all__ = [
    "apply_delta",
    "before_after",
    "before_after_grid",
    "choose_validation_rows",
    "delta_metadata",
    "load_delta",
    "write_card",
    "write_delta",
    "write_unet",
]

DELTA_VERSION = "1"


def write_unet(
    unet: UNet2DConditionModel,
    folder: str | os.PathLike[str],
    dtype: torch.dtype,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``folder`` so that ``UNet2DConditionModel.from_pretrained(folder)`` loads it.

    Args:
        unet: gives the architecture, and the weights where ``state_dict`` is None. It is not changed.
        state_dict: all weights, for example gathered fp32 masters; on any device.
        dtype: of the file; floating tensors are cast, others kept.

    Raises:
        UserError: a weight is not finite in ``dtype`` (the training diverged), or the folder cannot be written.
    """
    weights = unet.state_dict() if state_dict is None else state_dict
    cast = {name: _cast(tensor, dtype) for name, tensor in weights.items()}
    broken = next((name for name, tensor in cast.items() if not torch.isfinite(tensor).all()), None)
    if broken is not None:
        raise UserError(
            f"unet: {broken} is not finite in {str(dtype).removeprefix('torch.')}; the training diverged, "
            'lower train.learning_rate (or set export.dtype = "fp32" if the base model needs it); nothing was written'
        )
    config = {key: value for key, value in unet.config.items() if key != "_name_or_path"}  # a path of this machine
    with torch.device("meta"):
        shell = UNet2DConditionModel.from_config(config)
    shell.load_state_dict(cast, assign=True)
    with atomic_folder(folder) as partial:
        shell.save_pretrained(partial)


def write_delta(changed: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write the changed tensors (their new values, in their own dtype) with ``metadata`` in the file's header.

    Raises:
        UserError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in changed.items()}
    header = {"format": "pt", "format_version": DELTA_VERSION} | dict(metadata)
    with atomic_file(path) as partial:
        save_file(tensors, partial, metadata=header)


def delta_metadata(cfg: Config) -> dict[str, str]:
    """The header of a run's delta file: what it belongs to and what it does."""
    return {
        "base_model": cfg.model.pretrained_model_name_or_path,
        "base_revision": cfg.model.revision or "",
        "concepts": "; ".join(concept.name for concept in cfg.concepts),
        "keep": "; ".join(cfg.keep),
        "method": cfg.method,
    }


def load_delta(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a delta file: its tensors (CPU, dtype of the file) and its header.

    Raises:
        UserError: no such file, a damaged one, or one that is not a delta of a known version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise UserError(f"delta: cannot read {str(path)!r}: {first_line(error)}") from error
    version = header.get("format_version")
    if version != DELTA_VERSION:
        raise UserError(f"delta: {str(path)!r} has format_version {version!r}; this program reads {DELTA_VERSION!r}")
    return tensors, header


def apply_delta(unet: nn.Module, path: str | os.PathLike[str]) -> dict[str, str]:
    """Overwrite the changed tensors of ``unet``, in its own dtype; returns the file's header.

    Raises:
        UserError: the file cannot be read or belongs to another architecture. ``unet`` is then as it was.
    """
    tensors, header = load_delta(path)
    own = unet.state_dict()
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            raise UserError(
                f"delta: {str(path)!r} does not fit this U-Net ({name}); it was made for {header.get('base_model')!r}"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return header


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor.contiguous()
