"""Models with the public architectures and random weights, for tests and measurements where no model can be had.

A diffusers folder, or one file in the original layout, written tensor by tensor: full-size SDXL needs memory for its
largest tensor only. A tensor's values follow from the seed and its name, whatever is written.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastunlearn.models.architectures.base import PublicModel
from fastunlearn.models.formats.completeness import component_shapes
from fastunlearn.models.formats.folder_configs import write_configs
from fastunlearn.models.formats.original_layout import Shape, original_tensors
from fastunlearn.utils.dtypes import SAFETENSORS_NAMES
from fastunlearn.utils.files import atomic_file, atomic_folder

WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}


@dataclass(frozen=True)
class Tensorlike:
    """A tensor that is made when it is written."""

    shape: Shape
    make: Callable[[], Tensor]


def write_folder(model: PublicModel, folder: Path, dtype: torch.dtype, seed: int) -> dict[str, int]:
    """Write a diffusers folder with random weights; return the number of parameters of each component."""
    found = component_shapes(model)
    with atomic_folder(folder) as partial:
        place = Path(partial)
        write_configs(model, place)
        for component, shapes in found.items():
            tensors = {
                name: Tensorlike(shape, lambda n=name, s=shape, c=component: draw(c, n, s, seed))  # type: ignore[misc]
                for name, shape in shapes.items()
            }
            write_safetensors(place / component / WEIGHTS.get(component, "model.safetensors"), tensors, dtype)
    return {name: sum(math.prod(shape) for shape in shapes.values()) for name, shapes in found.items()}


def write_file(model: PublicModel, file: Path, dtype: torch.dtype, seed: int) -> None:
    """Write the same weights as one file in the original layout, with what the model predicts in its metadata."""
    predicts = model.scheduler["prediction_type"]
    metadata = {"modelspec.prediction_type": "v" if predicts == "v_prediction" else predicts}
    tensors = {
        original.name: Tensorlike(
            original.shape,
            lambda o=original, s=shapes[original.component]: o.make(  # type: ignore[misc]
                [draw(o.component, source, s[source], seed) for source in o.sources]
            ),
        )
        for shapes in [component_shapes(model)]
        for original in original_tensors(model, shapes)
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        write_safetensors(Path(partial), tensors, dtype, metadata)


def draw(component: str, name: str, shape: Shape, seed: int) -> Tensor:
    """Weights as PyTorch initialises a layer, uniform within 1 / sqrt(inputs); norms near 1, biases near 0.

    No two tensors are alike, so that one in another's place is seen.
    """
    # PyTorch's generator takes 32 bits of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{component}/{name}".encode()))
    middle, bound = 0.0, 1 / math.sqrt(math.prod(shape[1:]))
    if len(shape) == 1:
        middle, bound = float(name.endswith("weight")), 0.02
    elif "embedding.weight" in name:
        bound = 0.035
    return torch.empty(shape).uniform_(middle - bound, middle + bound, generator=generator)


def write_safetensors(
    file: Path, tensors: Mapping[str, Tensorlike], dtype: torch.dtype, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, one tensor in memory at a time."""
    width, end = dtype.itemsize, 0
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * width
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, content in _made(tensors, dtype):
            if content.nbytes != math.prod(tensors[name].shape) * width:
                raise AssertionError(f"{name}: {content.nbytes} bytes")
            stream.write(content.view(torch.uint8).numpy().data)


def _made(tensors: Mapping[str, Tensorlike], dtype: torch.dtype) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        yield name, tensor.make().to(dtype).contiguous().flatten()
