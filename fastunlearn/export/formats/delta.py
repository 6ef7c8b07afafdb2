"""delta.safetensors: the changed tensors only, with what they belong to in the header; written, read and applied."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from fastunlearn.errors import UserError
from fastunlearn.export.formats.base import Export, ExportFormat
from fastunlearn.models.public_name import public_hash, public_name
from fastunlearn.utils.files import atomic_file
from fastunlearn.utils.text import first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastunlearn.config import Config

DELTA_VERSION = "1"


class Delta(ExportFormat):
    """The tensors' new values, for the base model that the header names."""

    title = "the changed tensors only; base model, concepts and method are in its header"
    path = "delta.safetensors"

    def disk_bytes(self, unet_bytes: int, trained: int) -> int:
        """In fp32."""
        return 4 * trained

    def write(self, export: Export) -> None:
        """In the dtype of the export."""
        changed = {name: tensor.to(export.dtype) for name, tensor in export.changed.items()}
        write_delta(changed, export.folder / self.path, delta_metadata(export.cfg))


FORMAT = Delta()


def write_delta(changed: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write the changed tensors (their new values, in their own dtype) with ``metadata`` in the file's header.

    Raises:
        UserError: the file cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in changed.items()}
    header = {"format": "pt", "format_version": DELTA_VERSION} | dict(metadata)
    with atomic_file(path) as partial:
        save_file(tensors, partial, metadata=header)


def delta_metadata(cfg: Config) -> dict[str, str]:
    """The header of a run's delta file: what it belongs to and what it does."""
    return {
        "base_model": public_name(cfg.model),
        "base_sha256": public_hash(cfg.model),
        "base_revision": cfg.model.revision or "",
        "concepts": "; ".join(concept.name for concept in cfg.concepts),
        "keep": "; ".join(cfg.keep),
        "method": cfg.method,
    }


def load_delta(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a delta file: its tensors (CPU, dtype of the file) and its header.

    Raises:
        UserError: no such file, a damaged one, one with numbers that are not finite, or no delta of a known version.
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
    broken = next((name for name, tensor in tensors.items() if not _is_finite(tensor)), None)
    if broken is not None:
        raise UserError(f"delta: {str(path)!r} is damaged: {broken[:80]} is no tensor of finite numbers")
    return tensors, header


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.float().isfinite().all())


def apply_delta(unet: nn.Module, path: str | os.PathLike[str]) -> dict[str, str]:
    """Overwrite the changed tensors of ``unet``, in its own dtype; returns the file's header.

    Raises:
        UserError: the file cannot be read, belongs to another architecture, or has numbers beyond the range of the
            U-Net's dtype. ``unet`` is then as it was.
    """
    import torch

    tensors, header = load_delta(path)
    own = unet.state_dict()
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            raise UserError(
                f"delta: {str(path)!r} does not fit this U-Net ({name}); it was made for {header.get('base_model')!r}"
            )
        if not _is_finite(tensor.to(own[name].dtype)):
            raise UserError(
                f"delta: {str(path)!r} has numbers that {str(own[name].dtype).removeprefix('torch.')} cannot hold "
                f"({name}); load the U-Net in torch.float32"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return header
