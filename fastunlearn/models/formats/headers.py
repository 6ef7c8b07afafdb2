"""What a safetensors file says without being loaded: names, types and shapes of its tensors, and its metadata.

Nothing here depends on what the file claims about its own size. Torch is not imported. What the tensors are is told in
``single_file.py`` and ``folders.py``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fastunlearn.errors import UserError
from fastunlearn.utils.foreign import Unreadable, parse_json

FIELD = "model.pretrained_model_name_or_path"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
WEIGHT_SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx")
MAX_HEADER_BYTES = 100_000_000
"""Safetensors' own limit."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors that a safetensors file declares, compared with its size, and its metadata.

    Raises:
        UserError: the file is truncated, is not safetensors, or declares more or less data than it holds.
    """
    try:
        with file.open("rb"), safe_open(file, framework="np") as opened:  # opened first for the system's own error
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            metadata = opened.metadata() or {}
            return {name: _entry(part.get_dtype(), part.get_shape()) for name, part in slices.items()}, metadata
    except SafetensorError:
        raise UserError(f"{str(file)!r} is corrupt: {_damage(file)}; download it again") from None
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read: {error.strerror or error}") from None


def _entry(dtype: str, shape: list[int]) -> Entry:
    bits = re.search(r"\d+", dtype)  # "BF16", "F8_E4M3"; without a number: "BOOL"
    return Entry(dtype, tuple(shape), math.prod(shape) * (int(bits[0]) if bits else 8) // 8)


def _damage(file: Path) -> str:
    """What is wrong with a file that safetensors refuses, in words and numbers that it does not give."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            return f"no safetensors header in {size} bytes"
        if length > MAX_HEADER_BYTES:
            return f"its header claims {length:,} bytes, and safetensors allows {MAX_HEADER_BYTES:,}"
        content = stream.read(length)
    try:
        header = parse_json(content.decode("utf-8"))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        declared = max(ends, default=0)
        if 8 + length + declared == size:
            return "its safetensors header is unreadable"
        return f"it declares {8 + length + declared} bytes and has {size}"
    except Unreadable as error:
        return f"its safetensors header is unreadable: {error}"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "its safetensors header is unreadable"


def check_safetensors(file: Path) -> int:
    """Compare what a safetensors header declares with the size of the file; return its number of elements.

    Raises:
        UserError: as ``read_header``.
    """
    return sum(entry.elements for entry in read_header(file)[0].values())


def is_hub_id(name: str) -> bool:
    """Whether ``name`` reads as "org/name" and not as a path: its first part is no folder here, and its last no file of
    weights."""
    if not HUB_ID.fullmatch(name) or name.lower().endswith(WEIGHT_SUFFIXES):
        return False
    return not Path(name.partition("/")[0]).exists()
