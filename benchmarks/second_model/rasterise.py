"""Maintainer's script: how the PNG files in `pictures/` were made, as `fastunlearn/minicanvas/data/rasterise.py` says.

python benchmarks/second_model/rasterise.py FOLDER_OF_THE_UNPACKED_PACKAGES
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from fastunlearn.minicanvas.data.rasterise import PACKAGES, draw, write_sets

PICTURES = Path(__file__).parent / "pictures"
NAMES = {
    "dog": "dog-face", "monkey": "monkey-face", "rabbit": "rabbit-face", "frog": "frog", "umbrella": "umbrella",
    "guitar": "guitar", "rocket": "rocket", "cactus": "cactus", "crown": "crown",
}  # fmt: skip
CHARACTERS = {"momo": "monkey", "bruno": "poodle"}  # each has one look: Noto's, whatever set is asked for
OTHERS = """
    red-apple automobile cat-face tropical-fish house evergreen-tree butterfly sunflower mushroom sailboat key
    banana bicycle owl penguin anchor balloon basketball bell birthday-cake books bread camera candle carrot
    cherries cloud coconut corn cow-face crab dolphin doughnut egg elephant envelope eye fire gem-stone ghost
    grapes hammer hamburger helicopter honeybee jack-o-lantern lemon light-bulb lion locomotive magnet
    mouse-face octopus palm-tree panda pear pencil pig-face pineapple pizza rooster rose scissors snail snowman
    soccer-ball star strawberry sun telephone tent toilet trophy trumpet turtle unicorn violin volcano
    watermelon whale wrench
""".split()  # noqa: SIM905 (a hundred quoted words are harder to read)


def main(source: Path) -> None:
    """Write every set, the characters into each of them."""
    write_sets(source, PICTURES, NAMES, OTHERS)
    noto = json.loads((source / PACKAGES["noto"] / "package" / "icons.json").read_text())
    for name, key in CHARACTERS.items():
        picture = draw(noto, key)
        if picture is None:
            raise SystemExit(f"noto has no {key}")
        picture.save(PICTURES / "noto" / f"{name}.png", optimize=True)
        for short in PACKAGES:
            if short != "noto":
                shutil.copy(PICTURES / "noto" / f"{name}.png", PICTURES / short)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
