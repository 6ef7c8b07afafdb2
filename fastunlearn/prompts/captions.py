"""Images with captions in a folder, as text: which there are and what they say. The pixels are read elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastunlearn.errors import UserError
from fastunlearn.utils.foreign import Unreadable, parse_json, read_text

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def read_captions(folder: Path, field: str) -> list[tuple[Path, str]]:
    """(image, caption) of a folder, sorted by name. ``field``: what errors call it.

    Raises:
        UserError: no folder, no image, or an image without a caption.
    """
    if not folder.is_dir():
        raise UserError(f"{field}: {folder} is not a folder")
    listed: dict[str, str] = {}
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        rows = [_parsed(line, metadata, field) for line in _text(metadata, field).splitlines() if line.strip()]
        if not all(isinstance(row, dict) and _is_text(row, "file_name") and _is_text(row, "text") for row in rows):
            raise UserError(f"{field}: {metadata} needs file_name and text in every line")
        listed = {row["file_name"]: row["text"].strip() for row in rows}
    pairs = []
    for image in sorted(path for path in folder.iterdir() if _is_picture(path)):
        text = image.with_suffix(".txt")
        caption = listed.get(image.name) or (_text(text, field).strip() if text.is_file() else "")
        if not caption:
            raise UserError(f"{field}: {image.name} has no caption; add it to metadata.jsonl or {text.name}")
        pairs.append((image, caption))
    if not pairs:
        raise UserError(f"{field}: {folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return pairs


def _is_picture(path: Path) -> bool:
    """By its name; hidden files, such as the twins that macOS leaves on foreign disks ("._a.png"), are none."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _text(file: Path, field: str) -> str:
    try:
        return read_text(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{field}: {file.name} cannot be read: {reason}; captions are in UTF-8") from None


def _parsed(line: str, file: Path, field: str) -> Any:
    try:
        return parse_json(line)
    except Unreadable as error:
        raise UserError(f"{field}: {file} needs file_name and text in every line: {error}") from None


def _is_text(row: dict[str, Any], name: str) -> bool:
    return isinstance(row.get(name), str)
