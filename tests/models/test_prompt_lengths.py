"""Prompts whose concept the text encoders do not get to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTokenizer

from fastunlearn.config import Config
from fastunlearn.errors import UserError
from fastunlearn.models.formats.folder_configs import PUBLIC_MODELS
from fastunlearn.models.formats.random_weights import write_file, write_folder
from fastunlearn.models.text.prompt_lengths import check_prompts, cut_prompts, limit, load_tokenizers, other_prompts
from fastunlearn.schema.sections import ModelConfig

LONG = "a very detailed picture " * 30


@pytest.fixture(scope="module")
def tokenizers() -> list[CLIPTokenizer]:
    return load_tokenizers(ModelConfig())


def run(template: str = "{concept}", **fields: Any) -> Config:
    return Config.model_validate({"concepts": ["cat"], "prompts": {"templates": [template]}} | fields)


def test_the_concept_has_to_be_read(tokenizers: list[CLIPTokenizer]) -> None:
    check_prompts(run(), tokenizers)
    check_prompts(run("{concept}, " + LONG), tokenizers)
    with pytest.raises(UserError, match=r"'cat' stands behind the \d+ tokens that the text encoder reads") as error:
        check_prompts(run(LONG + "{concept}"), tokenizers)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    with pytest.raises(UserError, match="'cat' stands behind"):
        check_prompts(run("a vacation, " + LONG + "{concept}"), tokenizers)
    style = run(LONG + "{word}", concepts=["neon style"])
    with pytest.raises(UserError, match="'neon style' stands behind"):
        check_prompts(style, tokenizers)


def test_an_anchor_has_to_read_otherwise(tokenizers: list[CLIPTokenizer]) -> None:
    cfg = run(concepts=[{"name": "cat", "anchor": "fish"}])
    check_prompts(cfg, tokenizers)
    (concept,) = cfg.concepts
    same = cfg.model_copy(update={"concepts": [concept.model_copy(update={"anchor": " CAT "})]})
    with pytest.raises(UserError, match="as the same tokens, so there is nothing to erase of 'cat'"):
        check_prompts(same, tokenizers)


def test_other_prompts_that_are_cut_are_counted(tokenizers: list[CLIPTokenizer]) -> None:
    assert cut_prompts(["a cat", ""], tokenizers) is None
    said = cut_prompts(["a cat", LONG, LONG, LONG + "!"], tokenizers)
    assert said is not None and said.startswith("2 prompts are longer")
    cfg = run(report={"validation_prompts": [LONG]})
    assert LONG in other_prompts(cfg)


def test_tokenizers_of_folders_and_single_files(tmp_path: Path) -> None:
    model = PUBLIC_MODELS["tiny-sdxl"]
    write_folder(model, tmp_path / "folder", torch.float16, seed=0)
    write_file(model, tmp_path / "file.safetensors", torch.float16, seed=0)
    folder = load_tokenizers(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "folder")))
    (file,) = load_tokenizers(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "file.safetensors")))
    assert len(folder) == 2 and {limit(one) for one in (*folder, file)} == {77}
    assert folder[0]("a cat").input_ids == folder[1]("a cat").input_ids == file("a cat").input_ids
    (tmp_path / "folder" / "tokenizer" / "vocab.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        load_tokenizers(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "folder")))
