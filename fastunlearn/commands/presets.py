"""``fastunlearn presets``: the bundled configurations, and the text of one, to be copied and edited."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import Any

from fastunlearn.config.loader import read_toml
from fastunlearn.config.presets import preset_file, preset_files, preset_title


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="print the file of this preset; none: list them all")
    parser.add_argument("--json", action="store_true", help="print JSON only")


def run(args: Namespace) -> int:
    """Print the list, or one file.

    Raises:
        UserError: the preset is unknown.
    """
    if args.name is None:
        listed = listing()
        print(json.dumps(listed, indent=2) if args.json else table(listed))
        return 0
    file = preset_file(args.name)
    text = json.dumps(read_toml(str(file)), indent=2) if args.json else file.read_text(encoding="utf-8")
    print(text.rstrip("\n"))
    return 0


def listing() -> list[dict[str, Any]]:
    """Name, purpose, model and file of every preset."""
    return [
        {
            "name": name,
            "title": preset_title(file),
            "model": read_toml(str(file)).get("model", {}).get("pretrained_model_name_or_path", "minicanvas"),
            "file": str(file),
        }
        for name, file in preset_files().items()
    ]


def table(listed: list[dict[str, Any]]) -> str:
    """One line for each preset, below the model that it is for."""
    width = max(len(preset["name"]) for preset in listed)
    lines: list[str] = []
    for model in dict.fromkeys(preset["model"] for preset in listed):
        lines += [*([""] if lines else []), f"for {model}:"]
        lines += [f"  {p['name']:<{width}}  {p['title']}" for p in listed if p["model"] == model]
    return "\n".join(
        [
            *lines,
            "",
            "fastunlearn train --preset NAME      runs one; every option of `fastunlearn train` may be added",
            "fastunlearn presets NAME > my.toml   writes it to a file of your own, for `--config my.toml`",
        ]
    )
