"""Images with captions in a folder, as text: which there are and what they say. The pixels are read elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

from fastunlearn.errors import UserError

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
        try:
            rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
            listed = {row["file_name"]: row["text"] for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{field}: {metadata} needs file_name and text in every line") from error
    pairs = []
    for image in sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES):
        text = image.with_suffix(".txt")
        caption = listed.get(image.name) or (text.read_text(encoding="utf-8").strip() if text.is_file() else "")
        if not caption:
            raise UserError(f"{field}: {image.name} has no caption; add it to metadata.jsonl or {text.name}")
        pairs.append((image, caption))
    if not pairs:
        raise UserError(f"{field}: {folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return pairs
