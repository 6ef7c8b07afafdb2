"""Models that somebody changed, at random: configurations, headers, indices. Loaded, or refused in one line."""

from __future__ import annotations

import json
import random
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_text_input import SCALARS, TREES, nothing_but

from fastunlearn.config import ModelConfig, load_config
from fastunlearn.errors import UserError
from fastunlearn.models.checks import check_model
from fastunlearn.models.description import describe_model
from fastunlearn.models.formats.folder_configs import PUBLIC_MODELS
from fastunlearn.models.formats.headers import read_header
from fastunlearn.models.formats.random_weights import write_file, write_folder
from fastunlearn.models.formats.single_file import read_single_file
from fastunlearn.models.loading import load_pipeline, stored_dtype

CONFIGS = (
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)  # fmt: skip
BOUNDARIES = st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**63, 1e308, 1e-308, "", "1", [], {}, [0], [None], True])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("original")
    write_folder(PUBLIC_MODELS["tiny-sd15"], folder / "model", torch.float16, seed=0)
    write_file(PUBLIC_MODELS["tiny-sd15"], folder / "model.safetensors", torch.float16, seed=0)
    yield folder


def looked_at(place: Path, load: bool) -> None:
    """By everything that looks at a model before its weights are read; then loaded, where all of that lets it pass."""
    cfg = load_config(None, ["--concepts", "cat", f"--pretrained_model_name_or_path={place}"])
    model = ModelConfig(pretrained_model_name_or_path=str(place))
    passed = nothing_but(UserError, lambda: check_model(cfg))
    nothing_but(UserError, lambda: describe_model(cfg))
    nothing_but(UserError, lambda: stored_dtype(model))
    if passed is not None and load:
        nothing_but(UserError, lambda: load_pipeline(place))


@given(st.sampled_from(CONFIGS), st.data())
def test_configurations(original: Path, file: str, data: st.DataObject) -> None:
    """Some fields of one file have another value, or are gone, or the file is something else altogether."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(original / "model", Path(name) / "model"))
        content = json.loads((folder / file).read_text())
        for field in data.draw(st.lists(st.sampled_from(sorted(content)), min_size=1, max_size=3)):
            if data.draw(st.booleans()):
                content[field] = data.draw(BOUNDARIES | SCALARS | TREES)
            else:
                content.pop(field, None)
        whole: Any = data.draw(st.just(content) | TREES) if data.draw(st.integers(0, 9)) == 0 else content
        (folder / file).write_text(json.dumps(whole))
        looked_at(folder, load=True)
        assert [entry.name for entry in Path(name).iterdir()] == ["model"]


@given(st.sampled_from(["model.safetensors", "model/unet/diffusion_pytorch_model.safetensors"]), st.integers(0, 2**32))
def test_bytes_of_weights(original: Path, file: str, seed: int) -> None:
    """Flipped, cut, doubled, mostly in the header."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(original, Path(name) / "m")
        target = Path(name) / "m" / file
        content = bytearray(target.read_bytes())
        length = int.from_bytes(content[:8], "little")
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(8 + length if draw.random() < 0.9 else len(content))
            how = draw.randrange(4)
            if how == 0:
                content[place] = draw.randrange(256)
            elif how == 1:
                content[place] ^= 1 << draw.randrange(8)
            elif how == 2:
                del content[place : place + draw.randrange(1, 20)]
            else:
                content[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 20)))
        target.write_bytes(content[: draw.randrange(len(content))] if draw.random() < 0.1 else content)
        looked_at(Path(name) / "m" / file.split("/")[0], load=False)


@given(st.binary(max_size=300) | TREES.map(lambda tree: json.dumps(tree).encode()), st.integers(-3, 3) | st.integers(0))
def test_headers_of_any_content(header: bytes, off: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "a.safetensors"
        file.write_bytes(struct.pack("<Q", max(0, len(header) + off) % 2**64) + header)
        nothing_but(UserError, lambda: read_header(file))
        nothing_but(UserError, lambda: read_single_file(file))


@given(TREES)
def test_indices_of_shards(original: Path, tree: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(original / "model", Path(name) / "model"))
        index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": tree}))
        looked_at(folder, load=False)
        index.write_text(json.dumps(tree))
        looked_at(folder, load=False)
