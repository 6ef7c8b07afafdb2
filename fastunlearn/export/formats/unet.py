"""unet/: the whole edited U-Net in diffusers' format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastunlearn.errors import UserError
from fastunlearn.export.formats.base import Export, ExportFormat
from fastunlearn.utils.files import atomic_folder
from fastunlearn.utils.run_folder import UNET

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel
    from torch import Tensor


class UNetFolder(ExportFormat):
    """What ``UNet2DConditionModel.from_pretrained`` loads; evaluation and relearning read it, too."""

    title = "the edited U-Net, in diffusers' format"
    path = UNET
    read_by = "evaluation and relearning"

    @property
    def files(self) -> list[str]:
        """What diffusers writes, where it need not cut the weights into several files."""
        return [f"{self.path}/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")]

    def disk_bytes(self, unet_bytes: int, trained: int) -> int:
        """As the base's own, in the default dtype."""
        return unet_bytes

    def write(self, export: Export) -> None:
        """All weights, the changed ones among them."""
        unet = export.base.unet
        write_unet(unet, export.folder / self.path, export.dtype, state_dict={**unet.state_dict(), **export.changed})


FORMAT = UNetFolder()


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
    import torch

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
        shell = type(unet).from_config(config)
    shell.load_state_dict(cast, assign=True)
    with atomic_folder(folder) as partial:
        shell.save_pretrained(partial)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor.contiguous()
