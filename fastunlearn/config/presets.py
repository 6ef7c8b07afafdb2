"""The configurations that come with the package, by name: ``configs/sdxl_24gb_style.toml`` is ``sdxl-24gb-style``."""

from __future__ import annotations

from pathlib import Path

from fastunlearn.errors import UserError, nearest

FOLDER = Path(__file__).resolve().parents[1] / "configs"


def preset_files() -> dict[str, Path]:
    """The file of each preset, by name, in alphabetical order."""
    return {file.stem.replace("_", "-"): file for file in sorted(FOLDER.glob("*.toml"))}


def preset_file(name: str) -> Path:
    """The file of a preset; ``_`` in its name is as good as ``-``.

    Raises:
        UserError: there is none of that name.
    """
    known = preset_files()
    wanted = name.replace("_", "-")
    if wanted not in known:
        raise UserError(f"preset: {name!r} is unknown; `fastunlearn presets` lists them{nearest(wanted, known)}")
    return known[wanted]


def preset_title(file: Path) -> str:
    """What a preset is for: the first line of the comment that its file begins with."""
    with file.open(encoding="utf-8") as lines:
        return next(lines).strip("#: \n").rstrip(".")
