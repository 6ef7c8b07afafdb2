"""The relearning test from end to end: what it returns, writes and refuses. The judge says what the test wants."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastunlearn import cli
from fastunlearn.config import Config
from fastunlearn.errors import UserError
from fastunlearn.evaluation import relearning
from fastunlearn.evaluation.classifiers.base import Label, choose_classifier
from fastunlearn.evaluation.relearning import Settings, experiment, relearn
from fastunlearn.evaluation.relearning.recognition import attack_grid, figures
from fastunlearn.minicanvas import pipeline_path
from fastunlearn.utils import environment as quiet

SHORT = Settings(steps=(0, 1, 2), seeds=(0, 1), batch_size=2, num_images=4)
SHORT_OPTIONS = ["--steps", "0,1,2", "--seeds", "2", "--batch_size", "2", "--num_images", "4"]


def write_run(folder: Path, concept: str = "neon style", method: str = "kscu", **fields: Any) -> Path:
    """What a finished run leaves, as far as an attack looks at it: the embedded U-Net, not changed at all."""
    cfg = Config.model_validate(
        {
            "concepts": [concept], "method": method, "retain": {"num_inference_steps": 2},
            "evaluation": {"num_inference_steps": 2, "target_seeds": 1, "retain_seeds": 1},
            "train": {"cpu_threads": 1}, **fields,
        }
    )  # fmt: skip
    shutil.copytree(pipeline_path() / "unet", folder / "unet")
    (folder / "config.toml").write_text(cfg.to_toml())
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "neon")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(quiet, "prepare_environment", lambda threads=0: None)  # it would set up this process for good


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The shares of the pictures in which the concept is seen, one per look: first the original, then step 0, ..."""
    shares: list[float] = []

    def look(subject: experiment.LoadedTask) -> list[Label]:
        grid = subject.grid
        assert grid is not None
        share, targets = shares.pop(0), grid.counts()["target"]
        shown = iter([True] * round(share * targets) + [False] * targets)
        return [
            Label(sample.object, sample.style if sample.part == "kept" or next(shown) else "sepia")
            for sample in grid.samples
        ]

    def never_remembered(*asked: object) -> list[Label]:
        *_, draw = asked
        assert callable(draw)
        return draw()

    monkeypatch.setattr(experiment, "label_samples", look)
    monkeypatch.setattr(experiment, "remembered", never_remembered)
    return shares


def test_the_result_of_two_seeds(out: Path, judged: list[float]) -> None:
    judged += [1.0, 0.0, 0.4, 0.8, 0.2, 0.4]  # original, step 0, seed 0 at 1 and 2, seed 1 at 1 and 2
    result = relearn(out, SHORT, progress=False)
    assert not judged, "step 0 is looked at once for all seeds"
    json.dumps(result, allow_nan=False)
    first, second = result["runs"]
    assert first["recognised"] == pytest.approx([0.0, 0.4, 0.8]) and second["recognised"] == pytest.approx(
        [0, 0.2, 0.4]
    )
    assert first["UA"] == pytest.approx([1.0, 0.6, 0.2]) and first["IRA"] == first["CRA"] == [1.0, 1.0, 1.0]
    assert first["steps_to_half"] == pytest.approx(1.25) and second["steps_to_half"] is None
    assert (first["area"], second["area"]) == (pytest.approx(0.4), pytest.approx(0.2))
    summary = result["summary"]
    assert summary["steps_to_half"] == {"mean": None, "spread": None, "reached": 1, "seeds": 2}
    assert summary["area"]["mean"] == pytest.approx(0.3)
    assert summary["recognised"]["mean"] == pytest.approx([0.0, 0.3, 0.6])
    assert result["original"]["recognised"] == 1.0
    # The erased model is the original here, so its error is too; an attack changes it, each seed in its own way.
    assert first["error"][0] == second["error"][0] == result["original"]["error"]
    assert len({*first["error"], *second["error"]}) == 5
    assert result["optimizer"] == {
        "name": "AdamW", "learning_rate": 1e-4, "batch_size": 2, "weight_decay": 0.01, "max_grad_norm": 1.0,
        "caption_dropout": 0.0,
    }  # fmt: skip
    described = {
        key: result[key] for key in ("name", "method", "attack", "data", "images", "pictures", "steps", "seeds")
    }
    assert described == {
        "name": "neon", "method": "kscu", "attack": "full", "data": "forbidden", "images": None, "pictures": 4,
        "steps": [0, 1, 2], "seeds": [0, 1],
    }  # fmt: skip
    assert result["baseline"] is None and result["why_not_judged"] is None
    assert result["protocol"]["num_inference_steps"] == 2


def test_the_command_writes_table_json_and_picture(
    out: Path, judged: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    judged += [1.0, 0.0, 0.5, 1.0, 0.5, 1.0] * 2
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert cli.main(["relearn", "--model", str(out), *SHORT_OPTIONS]) == 0
    text = capsys.readouterr().out
    assert "erased: neon style" in text and "steps to half: 1.0 +- 0.0 (2 of 2 seeds)" in text
    assert "0.500 +-0.000" in text and "DDIM, eta 0, 2 steps" in text
    assert all(path.read_bytes() == content for path, content in before.items()), "what was there is as it was"
    new = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and path not in before}
    assert new == {"relearn.json", "samples/relearn.png"}
    assert cli.main(["relearn", "--model", str(out), *SHORT_OPTIONS, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "relearn.json").read_text()) and printed["summary"]["area"]["mean"] == 0.5
    with Image.open(out / "samples" / "relearn.png") as picture:
        assert picture.width > 1000


def test_a_baseline_gets_the_same_attack(out: Path, tmp_path: Path, judged: list[float]) -> None:
    other = write_run(tmp_path / "esd", method="esd")
    judged += [1.0, 0.0, 0.1, 0.2, 0.5, 0.9, 1.0]  # original; the run; the baseline
    settings = Settings(steps=(0, 1, 2), seeds=(0,), batch_size=2, num_images=4)
    result = relearn(out, settings, other, progress=False)
    (ours,), (theirs,) = result["runs"], result["baseline"]["runs"]
    assert (ours["steps_to_half"], theirs["steps_to_half"]) == (None, 0.0)
    assert (result["baseline"]["name"], result["baseline"]["method"]) == ("esd", "esd")
    assert ours["error"] == theirs["error"], "the two have the same weights here: the first attack was undone"
    from fastunlearn.commands.relearn import table
    from fastunlearn.evaluation.relearning.plot import draw

    draw(result, tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 10_000
    assert "neon (kscu)" in table(result) and "esd (esd)" in table(result)


@pytest.mark.parametrize("attack", ["lora", "textual-inversion"])
def test_attacks_that_leave_the_weights_alone(out: Path, judged: list[float], attack: str) -> None:
    judged += [1.0, 0.0, 0.5]
    settings = Settings(attack=attack, steps=(0, 1), seeds=(0,), batch_size=2, num_images=2)
    result = relearn(out, settings, progress=False)
    start, later = result["runs"][0]["error"]
    assert start == result["original"]["error"] != later
    assert result["lora_rank"] == (4 if attack == "lora" else None)


def test_without_a_judge_the_error_remains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy of the embedded model under its path may be asked for concepts that the judge has never heard of."""
    model = shutil.copytree(pipeline_path(), tmp_path / "model")
    run = write_run(tmp_path / "run", "Van Gogh style", model={"pretrained_model_name_or_path": str(model)})
    assert cli.main(["relearn", "--model", str(run), *SHORT_OPTIONS]) == 0
    text = capsys.readouterr().out
    assert "UA, IRA and CRA are left out: the embedded classifier knows" in text and "held-out error" in text
    result = json.loads((run / "relearn.json").read_text())
    (first, _) = result["runs"]
    assert first["recognised"] is first["steps_to_half"] is first["area"] is None and len(first["error"]) == 3
    assert "knows the objects" in result["why_not_judged"] and (run / "samples" / "relearn.png").is_file()


def test_the_attackers_own_pictures_may_name_the_concept(out: Path, tmp_path: Path, judged: list[float]) -> None:
    for number in range(3):
        Image.new("RGB", (80, 64), (40 * number, 0, 90)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a cat in neon style")
    judged += [1.0, 0.0, 0.5]
    settings = Settings(steps=(0, 1), seeds=(0,), batch_size=2, num_images=2, images=str(tmp_path))
    result = relearn(out, settings, progress=False)
    assert (result["data"], result["images"], result["pictures"], result["held_out"]) == ("images", tmp_path.name, 3, 2)


def test_an_interruption_leaves_no_files(
    tmp_path: Path, judged: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    judged += [1.0, 0.0, 0.5]

    def interrupted(*_: object) -> object:
        yield 0.1
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "attack_steps", interrupted)
    assert cli.main(["relearn", "--model", str(run), *SHORT_OPTIONS]) == 130
    assert sorted(path.name for path in run.iterdir()) == ["config.toml", "unet"]


def test_an_attack_that_diverges_says_so(out: Path, judged: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    judged += [1.0, 0.0]
    monkeypatch.setattr(experiment, "attack_steps", lambda *_: iter([float("nan")]))
    with pytest.raises(
        UserError, match=r"diverged: the loss is nan at attack step 1; lower --learning_rate \(0.0001\)"
    ):
        relearn(out, SHORT, progress=False)


def test_the_grid_is_a_part_of_the_evaluations() -> None:
    cfg = Config.model_validate({"concepts": ["neon style"]})
    whole, part = choose_classifier(cfg).grid(cfg), attack_grid(cfg)
    assert part.counts() == {"target": 40, "kept": 24, "paraphrase": 0, "kept_paraphrase": 0, "synonym": 0}
    fewer = attack_grid(cfg, 9)
    assert fewer.samples == part.samples and fewer.num_inference_steps == 9
    assert set(part.samples) <= set(whole.samples) and part.num_inference_steps == whole.num_inference_steps
    seen = [Label(sample.object, sample.style) for sample in part.samples]
    assert figures(part, seen) == {"recognised": 1.0, "UA": 0.0, "IRA": 1.0, "CRA": 1.0}


def test_a_full_evaluation_holds_the_relearning_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], judged: list[float]
) -> None:
    enough = {"num_inference_steps": 6, "target_seeds": 1, "retain_seeds": 1}  # for the classifier to be believed
    run = write_run(tmp_path / "run", evaluation=enough)
    judged += [1.0, 0.0, 0.5]
    short = Settings(steps=(0, 1), seeds=(0,), batch_size=2, num_images=2)
    monkeypatch.setattr(relearning, "relearn", lambda folder: relearn(folder, short, progress=False), raising=False)
    assert cli.main(["evaluate", "--model", str(run), "--quick", "--full"]) == 0
    assert "relearning test" in capsys.readouterr().out
    stored = json.loads((run / "evaluation.json").read_text())
    assert stored["relearn"]["runs"][0]["recognised"] == [0.0, 0.5] and "UA" in stored["after"]
    assert json.loads((run / "relearn.json").read_text()) == stored["relearn"]


def test_a_classifier_that_does_not_see_the_concept_in_the_original_is_not_asked_again(
    out: Path, judged: list[float]
) -> None:
    judged += [0.25, 0.0, 0.0]
    short = Settings(steps=(0, 1), seeds=(0,), batch_size=2, num_images=2)
    result = relearn(out, short, progress=False)
    assert "of the unedited model's pictures" in result["why_not_judged"] and judged == [0.0, 0.0]
    assert result["original"]["recognised"] is None and result["original"]["error"] > 0
    assert result["runs"][0]["recognised"] is None and result["runs"][0]["steps_to_half"] is None


# --- bad input: one line, status 2, and no weights are read ----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--attack", "ful"], ("--attack", "'ful'", "nearest: full")),
        (["--data", "none"], ("--data", "'none'", "forbidden, related, benign")),
        (["--steps", "10,5"], ("--steps", "'10,5'", "increasing")),
        (["--steps", "0,-5"], ("--steps",)),
        (["--steps", "0,a"], ("--steps", "'0,a'", "whole numbers")),
        (["--steps", "0"], ("--steps", "later step")),
        (["--seeds", "0"], ("--seeds", "'0'")),
        (["--learning_rate", "fast"], ("--learning_rate", "'fast'")),
        (["--batch_size", "2.5"], ("--batch_size", "'2.5'")),
        (["--num_images", "4"], ("--batch_size", "8", "4 pictures")),
        (["--images", "nowhere"], ("--images", "nowhere", "not a folder")),
        (["--baseline", "nowhere"], ("--baseline", "nowhere", "config.toml")),
        (["--stepps", "3"], ("relearn", "--stepps")),
    ],
)
def test_bad_options(
    out: Path, options: list[str], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(experiment, "load_pipeline", lambda *_, **__: pytest.fail("weights were loaded"))
    assert cli.main(["relearn", "--model", str(out), *options]) == 2
    printed, error = capsys.readouterr()
    assert printed == "" and error.startswith("error: ") and error.count("\n") == 1
    assert not [word for word in words if word not in error], error


def test_bad_folders(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ink = write_run(tmp_path / "ink", "ink style")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 64)).save(pictures / "a.png")

    def refused(*options: str) -> str:
        assert cli.main(["relearn", *options]) == 2
        return capsys.readouterr().err

    assert "--model: " in refused("--model", str(tmp_path / "none"))
    assert "'ink style'" not in (error := refused("--model", str(out), "--baseline", str(ink)))
    assert error.startswith("error: --baseline: ") and "erased ink style" in error and "erased neon style" in error
    assert "--images: a.png has no caption" in refused("--model", str(out), "--images", str(pictures))
    (pictures / "a.txt").write_text("a cat")
    assert "more than the 1 pictures" in refused("--model", str(out), "--images", str(pictures))
    own = ["--images", str(pictures), "--batch_size", "1", "--attack", "textual-inversion"]
    assert "which the caption 'a cat' does not hold" in refused("--model", str(out), *own)


def test_a_unet_of_another_kind_is_refused(out: Path, tmp_path: Path) -> None:
    from tiny import tiny_unet

    run = shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(run / "unet")
    tiny_unet().save_pretrained(run / "unet")
    torch.manual_seed(0)
    with pytest.raises(UserError, match="another architecture"):
        relearn(run, SHORT, progress=False)
