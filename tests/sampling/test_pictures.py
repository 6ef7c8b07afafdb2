"""Pictures that users bring: turned, on white, scaled by their depth; and what is none, is one line."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastunlearn.errors import UserError
from fastunlearn.prompts.captions import read_captions
from fastunlearn.sampling.pictures import check_pictures, read_picture

RED, WHITE = (255, 0, 0), (255, 255, 255)


def corner(path: Path) -> tuple[int, ...]:
    return read_picture(path, "images").getpixel((0, 0))  # type: ignore[return-value]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_as_its_camera_says(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8] = RED
    turned = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1), 7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_picture(tmp_path / "a.png", "images")), upright)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(file)
    assert corner(file) == WHITE
    Image.new("RGBA", (4, 4), (255, 0, 0, 255)).save(file)
    assert corner(file) == RED
    Image.new("LA", (4, 4), (0, 128)).save(file)
    assert corner(file) == (127, 127, 127)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(file, transparency=0)
    assert corner(file) == WHITE
    Image.new("RGB", (4, 4), (0, 0, 0)).save(file, transparency=(0, 0, 0))
    assert corner(file) == WHITE


@pytest.mark.parametrize(
    ("values", "suffix", "grey"),
    [
        (np.full((4, 4), 65535, np.uint16), "png", 255),
        (np.full((4, 4), 32896, np.uint16), "png", 128),
        (np.full((4, 4), 257, np.uint16), "tif", 1),
        (np.full((4, 4), 2**31 - 1, np.int32), "tif", 255),
        (np.full((4, 4), 32896, np.int32), "tif", 128),
        (np.full((4, 4), 0.5, np.float32), "tif", 128),
        (np.full((4, 4), 200.0, np.float32), "tif", 200),
    ],
)
def test_depths_are_scaled_not_cut(tmp_path: Path, values: np.ndarray, suffix: str, grey: int) -> None:
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(values).save(file)
    assert corner(file) == (grey, grey, grey)


def test_the_clear_value_of_a_deep_picture_is_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 257, np.uint16)).save(tmp_path / "a.png", transparency=257)
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.mode == "I;16" and opened.info["transparency"] == 257
    assert corner(tmp_path / "a.png") == WHITE


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_every_mode_is_rgb(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.new("RGB", (8, 8), WHITE).convert(mode).save(file)
    picture = read_picture(file, "images")
    assert picture.mode == "RGB" and min(picture.getpixel((3, 3))) > 250  # type: ignore[arg-type]


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b"no picture", "cannot be read"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read"),
        (b"GIF89a", "cannot be read"),
        (png_that_claims(30_000, 30_000), "more than"),
        (png_that_claims(12_000, 12_000), "more than"),
        (png_that_claims(0, 5), "cannot be read"),
        (png_that_claims(64, 64), "cannot be read"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=rf"^images: a.png .*{words}") as error:
        check_pictures([(tmp_path / "a.png", "x")], "images")
    assert "\n" not in str(error.value)


def test_floats_that_are_not_finite(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a.tif cannot be read"):
        read_picture(tmp_path / "a.tif", "images")


def folder_of(path: Path, captions: dict[str, bytes]) -> Path:
    for name, caption in captions.items():
        Image.new("RGB", (4, 4)).save(path / f"{name}.png")
        (path / f"{name}.txt").write_bytes(caption)
    return path


def test_captions_lose_their_mark_and_twins_are_left_out(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a": b"\xef\xbb\xbfa cat\r\n", "b": "ein Käfer".encode()})
    (folder / "._a.png").write_bytes(b"\x00\x05\x16\x07")
    (folder / ".hidden.jpg").write_bytes(b"")
    assert [(path.name, text) for path, text in read_captions(folder, "images")] == [
        ("a.png", "a cat"), ("b.png", "ein Käfer"),
    ]  # fmt: skip
    line = json.dumps({"file_name": "a.png", "text": "a dog"})
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode())
    assert read_captions(folder, "images")[0][1] == "a dog"


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("[1]", "needs file_name and text"),
        ('{"file_name": "a.png", "text": 3}', "needs file_name and text"),
        ('{"file_name": ["a.png"], "text": "x"}', "needs file_name and text"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "no valid JSON"),
    ],
)
def test_captions_of_another_shape(tmp_path: Path, metadata: str, words: str) -> None:
    (folder_of(tmp_path, {"a": b"x"}) / "metadata.jsonl").write_text(metadata)
    with pytest.raises(UserError, match=words) as error:
        read_captions(tmp_path, "images")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("caption", ["a café".encode("latin-1"), "a cat".encode("utf-16")])
def test_captions_in_another_encoding_are_named(tmp_path: Path, caption: bytes) -> None:
    with pytest.raises(UserError, match=r"images: a.txt cannot be read: .*UTF-8"):
        read_captions(folder_of(tmp_path, {"a": caption}), "images")
