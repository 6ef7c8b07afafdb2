"""Maintainer's script: how the PNG files in `pictures/` were made from the emoji packages of Iconify.

Not used at run time (it needs resvg_py and the unpacked npm packages; the package itself needs Pillow and NumPy only).

    npm pack @iconify-json/noto@1.2.9 @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/twemoji@1.2.5 \
             @iconify-json/emojione@1.2.3 @iconify-json/noto-v1@1.2.5
    for f in iconify-json-*.tgz; do mkdir ${f%.tgz}; tar xzf $f -C ${f%.tgz}; done
    python -m fastunlearn.minicanvas.data.rasterise FOLDER_OF_THE_UNPACKED_PACKAGES
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from PIL import Image

SIZE = 128
PACKAGES = {
    "noto": "iconify-json-noto-1.2.9",
    "fluent": "iconify-json-fluent-emoji-flat-1.2.6",
    "twemoji": "iconify-json-twemoji-1.2.5",
    "emojione": "iconify-json-emojione-1.2.3",
    "noto-v1": "iconify-json-noto-v1-1.2.5",
}
NAMES = {
    "apple": "red-apple", "car": "automobile", "cat": "cat-face", "fish": "tropical-fish", "house": "house",
    "tree": "evergreen-tree", "butterfly": "butterfly", "sunflower": "sunflower", "mushroom": "mushroom",
    "sailboat": "sailboat",
}  # fmt: skip
# More drawings of the objects, for the judge only: other designs and near relatives ("extra" folder).
EXTRA = {
    "apple": ("green-apple",), "car": ("sport-utility-vehicle", "taxi", "oncoming-automobile"),
    "cat": ("grinning-cat", "pouting-cat"), "fish": ("fish",), "house": ("house-with-garden", "derelict-house"),
    "tree": ("deciduous-tree",), "mushroom": ("brown-mushroom",),
}  # fmt: skip
EXTRA_PACKAGES = {
    "fluent3d": ("iconify-json-fluent-emoji-1.2.7", {}),
    "streamline": ("iconify-json-streamline-emojis-1.2.4", {"house": "house-with-garden", "sunflower": "sunflower-1"}),
    "fxemoji": ("iconify-json-fxemoji-1.2.2", {"apple": "redapple", "car": "redcar", "house": "housebuilding",
                                                "tree": "deciduoustree"}),
}  # fmt: skip
OTHERS = """
    umbrella rocket frog guitar key crown banana cactus bicycle owl penguin anchor alarm-clock balloon basketball
    bell birthday-cake books bread broccoli camera candle carrot cherries cheese-wedge chess-pawn
    closed-umbrella cloud coconut compass corn cow-face crab dog-face dolphin doughnut egg elephant envelope eye
    fire four-leaf-clover french-fries gem-stone ghost grapes hammer hamburger helicopter honeybee hourglass-done
    ice-cream jack-o-lantern kiwi-fruit ladder lemon light-bulb lion locomotive magnet microphone money-bag monkey-
    face moai motorcycle mouse-face octopus palm-tree panda peach pear pencil pig-face pineapple pizza rabbit-face
    ring rooster rose scissors snail snowman soccer-ball spider star strawberry sun teacup-without-handle telephone
    tent tangerine tomato toilet trophy trumpet tulip turtle unicorn violin volcano watermelon whale wrench
""".split()  # noqa: SIM905 (a hundred quoted words are harder to read)


def draw(icons: dict, name: str) -> Image.Image | None:
    """The icon `name` as a SIZE x SIZE RGBA picture; None where the set lacks it."""
    import resvg_py

    aliases = icons.get("aliases", {})
    while name in aliases:
        name = aliases[name]["parent"]
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def write_sets(source: Path, target: Path, names: dict[str, str], others: list[str]) -> None:
    """Write `target/SET/NAME.png` of every set, and `target/SET/others.png`, one strip of all the other emoji."""
    for short, package in PACKAGES.items():
        icons = json.loads((source / package / "package" / "icons.json").read_text())
        folder = target / short
        folder.mkdir(parents=True, exist_ok=True)
        for name, key in names.items():
            picture = draw(icons, key)
            if picture is None:
                raise SystemExit(f"{package} has no {key}")
            picture.save(folder / f"{name}.png", optimize=True)
        drawn = [picture for key in others if (picture := draw(icons, key)) is not None]
        sheet = Image.new("RGBA", (10 * SIZE, -(-len(drawn) // 10) * SIZE))
        for i, picture in enumerate(drawn):
            sheet.paste(picture, (i % 10 * SIZE, i // 10 * SIZE))
        sheet.quantize(256, Image.Quantize.FASTOCTREE).save(folder / "others.png", optimize=True)
        print(short, len(drawn))


def write_extra(source: Path, folder: Path) -> None:
    """Write `folder/OBJECT-SET-ICON.png` for the judge's additional drawings, where a set has them."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(short, PACKAGES[short], name, key) for short in ("noto", "fluent", "twemoji", "emojione")
            for name, keys in EXTRA.items() for key in keys]  # fmt: skip
    for short, (package, own_names) in EXTRA_PACKAGES.items():
        jobs += [(short, package, name, own_names.get(name, key)) for name, key in NAMES.items()]
    for short, package, name, key in jobs:
        picture = draw(json.loads((source / package / "package" / "icons.json").read_text()), key)
        if picture is not None:
            picture.save(folder / f"{name}-{short}-{key}.png", optimize=True)


if __name__ == "__main__":
    PICTURES = Path(__file__).parent.parent / "pictures"
    write_sets(Path(sys.argv[1]), PICTURES, NAMES, OTHERS)
    write_extra(Path(sys.argv[1]), PICTURES / "extra")
