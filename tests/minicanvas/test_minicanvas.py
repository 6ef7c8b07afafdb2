"""MiniCanvas: words, drawings, the shipped model and judge, and the bounds that they have to keep."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastunlearn import minicanvas
from fastunlearn.minicanvas import vocabulary
from fastunlearn.minicanvas.data import dataset, pictures
from fastunlearn.minicanvas.data.dataset import Recipe

HELD_OUT = Recipe(240, seed=501, sets=pictures.HELD_OUT_SETS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two-thread convolutions crawl on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(minicanvas.pipeline_path(), local_files_only=True)


@pytest.fixture(scope="module")
def judge():
    return minicanvas.load_judge()


def test_vocabulary():
    assert len(minicanvas.OBJECTS) >= 10 and len(minicanvas.STYLES) == 8
    assert set(minicanvas.SYNONYMS) == set(minicanvas.OBJECTS)
    assert minicanvas.EVALUATION_TEMPLATE in minicanvas.TEMPLATES
    assert not set(minicanvas.PARAPHRASES) & set(minicanvas.TEMPLATES)
    words = [word for names in minicanvas.SYNONYMS.values() for word in names]
    assert len(words) == len(set(words)) and not set(words) & set(minicanvas.OBJECTS)


@pytest.mark.parametrize(
    ("name", "kind", "normal"),
    [
        ("neon style", "style", "neon"),
        ("Neon", "style", "neon"),
        ("cat", "object", "cat"),
        (" kitty ", "object", "cat"),
        ("Van Gogh style", None, "van gogh"),
        ("style", None, "style"),
        ("", None, ""),
    ],
)
def test_concept_names(name, kind, normal):
    assert minicanvas.concept_kind(name) == kind
    assert minicanvas.normalise_concept(name) == normal


def test_captions_are_known_and_short():
    from transformers import CLIPTokenizer

    captions = set(vocabulary.WORDS.all_captions())
    rng = random.Random(3)
    drawn = {vocabulary.WORDS.random_caption(rng.randrange(10), rng.randrange(8), rng) for _ in range(3000)}
    assert drawn <= captions
    for needed in (
        "an image in neon style",
        "a picture of a cat",
        "cat",
        "neon style",
        "neon",
        "a cat image in neon style",
    ):
        assert needed in captions
    tokenizer = CLIPTokenizer.from_pretrained(minicanvas.pipeline_path() / "tokenizer")
    assert max(len(ids) for ids in tokenizer(sorted(captions)).input_ids) <= tokenizer.model_max_length
    words = {word for caption in captions for word in caption.replace(",", "").split()}
    assert all(len(tokenizer(word).input_ids) == 3 for word in words), "every known word is one token"


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_the_files_for_older_transformers_give_the_same_ids(part, tmp_path):
    """They read `vocab.json` and `merges.txt`, which are what the build writes from the shipped `tokenizer.json`."""
    from transformers import CLIPTokenizer

    from fastunlearn.minicanvas.build.text import write_vocabulary

    folder = minicanvas.pipeline_path() / part
    shutil.copy(folder / "tokenizer.json", tmp_path)
    write_vocabulary(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    shipped = CLIPTokenizer.from_pretrained(folder)
    end = "<|endoftext|>"
    older = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token=end, bos_token="<|startoftext|>",
        eos_token=end, pad_token=end, model_max_length=shipped.model_max_length,
    )  # fmt: skip
    texts = [*vocabulary.WORDS.all_captions(), "a painting by Van Gogh", "Kitty's 12 fish, neon!", "naïve café"]
    assert older(texts, padding="max_length", truncation=True).input_ids == (
        shipped(texts, padding="max_length", truncation=True).input_ids
    )


def test_path_needs_no_torch():
    code = (
        "import sys, fastunlearn.minicanvas as m; assert m.pipeline_path().is_dir(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_size_and_format():
    files = [path for path in minicanvas.pipeline_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}


def test_attribution_covers_every_set():
    text = (pictures.FOLDER / "ATTRIBUTION.md").read_text()
    folders = {path.name for path in pictures.FOLDER.iterdir() if path.is_dir()}
    assert folders == {*pictures.JUDGE_SETS, *pictures.HELD_OUT_SETS, "extra"}
    extra_sets = {path.name.split("-")[1] for path in (pictures.FOLDER / "extra").iterdir()}
    assert all(f"`{name}`" in text or f"extra/*-{name}-*" in text for name in extra_sets)
    assert all(f"`{folder}`" in text for folder in folders)
    for licence in ("Apache-2.0", "MIT License", "CC-BY 4.0"):
        assert licence in text


def test_held_out_drawings_stay_out(monkeypatch):
    from fastunlearn.minicanvas.build.editions import CANVAS

    opened: set[str] = set()

    def note(picture_set: str, *_: object) -> tuple[np.ndarray, ...]:
        opened.add(picture_set)
        return (np.ones((128, 128, 4), np.float32),) * len(minicanvas.OBJECTS)

    monkeypatch.setattr(pictures, "load_objects", note)
    monkeypatch.setattr(pictures, "load_others", note)
    read_by = {}
    for name, recipe in CANVAS.recipes.items():
        opened.clear()
        for i in range(40):
            dataset.render_sample(recipe, i)
        read_by[name] = set(opened)
    assert read_by["pictures_unet"] == read_by["pictures_vae"] == set(pictures.GENERATOR_SETS)
    assert read_by["pictures_judge"] == set(pictures.JUDGE_SETS)
    assert not set(pictures.JUDGE_SETS) & set(pictures.HELD_OUT_SETS)
    assert not [path for path in (pictures.FOLDER / "extra").iterdir() if "noto-v1" in path.name]


def test_dataset_is_deterministic():
    recipe = Recipe(dataset.CHUNK + 20, seed=5, others=0.2)
    whole = dataset.render_all(recipe, processes=2)
    again = [dataset.render_sample(recipe, i) for i in (0, 7, dataset.CHUNK + 19)]
    for i, (image, thing, style, _) in zip((0, 7, dataset.CHUNK + 19), again, strict=True):
        assert np.array_equal(whole.images[i], image)
        assert (whole.objects[i], whole.styles[i]) == (thing, style)
    assert (whole.objects == dataset.OTHER).mean() == pytest.approx(0.2, abs=0.06)


def test_judge_reads_held_out_drawings(judge):
    from fastunlearn.minicanvas.build.train_judge import accuracy

    rendered = dataset.render_all(HELD_OUT)
    objects, styles = accuracy(judge, rendered)
    assert objects >= 0.65 and styles >= 0.97
    # A drawing that it is not sure of is "other", hardly ever another object.
    pictures_in = torch.from_numpy(rendered.images).permute(0, 3, 1, 2).float() / 255
    read = judge.classify(pictures_in)[0].argmax(1).numpy()
    assert ((read != rendered.objects) & (read != dataset.OTHER)).mean() <= 0.05
    others = dataset.render_all(Recipe(100, seed=502, sets=pictures.HELD_OUT_SETS, others=1.0))
    assert accuracy(judge, others)[0] >= 0.85


def test_judge_calls_ruined_pictures_other(judge):
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(20, 3, 64, 64, generator=generator)
    plain = torch.rand(20, 3, 1, 1, generator=generator).expand(-1, -1, 64, 64)
    for ruined in (noise, plain):
        assert (judge.classify(ruined)[0].argmax(1) == dataset.OTHER).float().mean() >= 0.75


def test_autoencoder_is_sharp_enough(pipe):
    from fastunlearn.minicanvas.build.train_vae import reconstruction_psnr, to_model_range

    rendered = dataset.render_all(Recipe(160, seed=503, sets=pictures.HELD_OUT_SETS))
    assert reconstruction_psnr(pipe.vae, to_model_range(rendered.images)).mean() >= 23.0


def test_shipped_pipeline_is_sdxl(pipe):
    assert next(pipe.unet.parameters()).dtype == torch.float32
    assert pipe.unet.config.addition_embed_type == "text_time"
    assert pipe.config.force_zeros_for_empty_prompt
    scheduler = pipe.scheduler
    assert type(scheduler).__name__ == "EulerDiscreteScheduler"
    assert (scheduler.config.timestep_spacing, scheduler.config.steps_offset) == ("leading", 1)
    image = pipe("a cat image in neon style", num_inference_steps=2, height=64, width=64, output_type="np").images[0]
    assert image.shape == (64, 64, 3) and np.isfinite(image).all()


def test_model_draws_what_it_is_told(pipe, judge):
    from fastunlearn.minicanvas.build.drawing import grid_cells, read_grid

    reading, _ = read_grid(pipe, judge, grid_cells()[::2], [7], steps=15)
    assert reading.share(0) >= 0.9 and reading.share(1) >= 0.9


def test_bare_names_condition(pipe, judge):
    from fastunlearn.evaluation.pictures.drawing import generate

    objects = generate(pipe, list(minicanvas.OBJECTS), list(range(10)), steps=12)
    styles = generate(pipe, [f"{style} style" for style in minicanvas.STYLES], list(range(8)), steps=12)
    assert (judge.classify(objects)[0].argmax(1) == torch.arange(10)).float().mean() >= 0.8
    assert (judge.classify(styles)[1].argmax(1) == torch.arange(8)).float().mean() >= 0.8


def test_latents_depend_on_the_seed_only(pipe):
    from fastunlearn.evaluation.pictures.drawing import generate

    alone = generate(pipe, ["cat"], [5], steps=2)
    among = generate(pipe, ["fish", "cat", "ink style"], [4, 5, 6], steps=2)
    assert torch.allclose(alone[0], among[1], atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--steps", "0"], "--steps"),
        (["sample", "--output", "no/such/folder/a.png"], "--output"),
        (["rebuild", "--output", "x", "--processes", "0"], "--processes"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    from fastunlearn.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["minicanvas", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_path_command_prints_only_the_folder(capsys):
    from fastunlearn.cli import main

    assert main(["minicanvas", "path"]) == 0
    assert Path(capsys.readouterr().out.strip()) == minicanvas.pipeline_path()


def test_rebuild_goes_through_every_stage_and_resumes(tmp_path):
    """A smoke test of the real stages with a few steps each; a second call finds everything done."""
    from fastunlearn.minicanvas.build import rebuild

    build = rebuild.Build(tmp_path, processes=1, quick=True)
    lines: list[str] = []
    report = rebuild.rebuild(build, say=lines.append)
    assert report["images"] == 80 and 0 <= report["object"] <= 1
    assert (tmp_path / "model" / "model_index.json").exists() and (tmp_path / "judge.safetensors").exists()
    assert len(lines) == len(rebuild.STAGES) + 1
    lines.clear()
    assert rebuild.rebuild(build, say=lines.append) == report
    assert len(lines) == 1
