"""Scoring: the grid, the figures, the drawing and the command, with a judge that says what the test wants."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from fastunlearn import minicanvas
from fastunlearn.commands import evaluate as command
from fastunlearn.config import Config
from fastunlearn.errors import UserError
from fastunlearn.evaluation import evaluate as evaluation
from fastunlearn.evaluation.classifiers.base import Label
from fastunlearn.evaluation.classifiers.minicanvas_grid import build_grid, known_concepts, seed_list
from fastunlearn.evaluation.metrics.scores import clear_difference, score, wilson
from fastunlearn.evaluation.pictures import drawing as generation
from fastunlearn.evaluation.pictures.drawing import generate, initial_latents
from fastunlearn.evaluation.pictures.grid import Erased, EvaluationSample
from fastunlearn.minicanvas.build import networks
from fastunlearn.minicanvas.build.assemble import make_pipeline
from fastunlearn.minicanvas.build.text import write_tokenizer
from fastunlearn.minicanvas.vocabulary import OBJECTS, PARAPHRASES, STYLES, SYNONYMS
from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.utils import environment as quiet

NEON, INK, CAT, FISH = (
    Erased("neon", "style"),
    Erased("ink", "style"),
    Erased("cat", "object"),
    Erased("fish", "object"),
)

# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [  # Newcombe 1998, table I (score method, no continuity correction), and the two borders
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_matches_published_values(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits / count, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_refuses_nothing_and_nonsense() -> None:
    for share, count in ((0.5, 0), (1.2, 10)):
        with pytest.raises(ValueError, match="at least one image"):
            wilson(share, count)


def test_a_small_change_is_noise_and_a_large_one_is_not() -> None:
    assert not clear_difference(0.97, 0.95, 144, 144)
    assert clear_difference(0.97, 0.80, 144, 144)
    assert clear_difference(0.02, 0.99, 80, 80)
    # Newcombe 1998, table II, example (a): 56/70 against 48/80, difference 0.2 with interval 0.0524 to 0.3339
    assert clear_difference(48 / 80, 56 / 70, 80, 70)
    assert clear_difference(56 / 70, 48 / 80, 70, 80)


# --- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("concepts", "counts"),
    [
        ([NEON], {"target": 80, "kept": 140, "paraphrase": 40, "kept_paraphrase": 40, "synonym": 0}),
        ([CAT], {"target": 64, "kept": 144, "paraphrase": 40, "kept_paraphrase": 40, "synonym": 16}),
        ([NEON, CAT], {"target": 72 + 56, "kept": 126, "paraphrase": 80, "kept_paraphrase": 40, "synonym": 16}),
    ],
    ids=["style", "object", "both"],
)
def test_grid_has_the_stated_sizes(concepts: list[Erased], counts: dict[str, int]) -> None:
    assert build_grid(concepts).counts() == counts


@pytest.mark.parametrize("concepts", [[NEON], [CAT], [NEON, CAT], [NEON, INK, CAT, FISH]])
@pytest.mark.parametrize("quick", [False, True])
def test_every_cell_asks_for_what_its_part_says(concepts: list[Erased], quick: bool) -> None:
    samples = build_grid(concepts, quick=quick).samples
    assert len(set(samples)) == len(samples)
    for sample in samples:
        held = [c for c in concepts if c.name in (sample.object, sample.style)]
        assert held == ([sample.concept] if sample.concept else [])
        if sample.part in ("target", "kept"):
            assert sample.prompt == f"a {sample.object} image in {sample.style} style"
        elif sample.part == "synonym":
            assert any(f"a {word} image" in sample.prompt for word in SYNONYMS[sample.object])
            assert f"a {sample.object} image" not in sample.prompt
        else:
            assert sample.prompt in [words.format(object=sample.object, style=sample.style) for words in PARAPHRASES]


@pytest.mark.parametrize("concepts", [[NEON], [CAT], [NEON, INK], [CAT, FISH]])
def test_quick_is_about_a_third_and_visits_every_class_evenly(concepts: list[Erased]) -> None:
    full, quick = build_grid(concepts), build_grid(concepts, quick=True)
    for part, count in quick.counts().items():
        assert full.counts()[part] * 0.28 <= count <= full.counts()[part] * 0.4
    kept = [sample for sample in quick.samples if sample.part == "kept"]
    for kind in ("object", "style"):
        visits = Counter(getattr(sample, kind) for sample in kept)
        assert len(visits) == (10 if kind == "object" else 8) - sum(c.kind == kind for c in concepts)
        assert max(visits.values()) - min(visits.values()) <= 2
    target = [sample for sample in quick.samples if sample.part == "target"]
    assert max(Counter((c.object, c.style) for c in target).values()) <= 4


def test_reworded_cells_visit_all_wordings_and_synonyms() -> None:
    samples = build_grid([CAT]).samples
    for words in PARAPHRASES:
        start = words.split("{")[0] or words.split("}")[-1]
        assert sum(start in sample.prompt for sample in samples if sample.part == "paraphrase") >= 10
    assert all(sum(word in c.prompt for c in samples if c.part == "synonym") == 8 for word in SYNONYMS["cat"])
    kept = [sample for sample in samples if sample.part == "kept_paraphrase"]
    assert {sample.style for sample in kept} == set(STYLES)
    assert len({sample.object for sample in kept}) == 9


def test_the_digest_follows_what_is_drawn() -> None:
    base = build_grid([NEON])
    assert base.digest() == build_grid([NEON]).digest()
    others = [
        build_grid([INK]),
        build_grid([NEON], quick=True),
        build_grid([NEON], num_inference_steps=30),
        build_grid([NEON], guidance_scale=3.0),
        build_grid([NEON], seeds=[1, 2]),
    ]
    assert len({base.digest(), *(other.digest() for other in others)}) == 6


def test_seed_list_continues_without_repeating() -> None:
    assert seed_list([188, 288], 5) == [188, 288, 1188, 1288, 2188]


def test_concepts_are_read_in_the_judges_words() -> None:
    assert known_concepts(["Neon style", "kitty", "cat"]) == (NEON, CAT)
    assert known_concepts(["Van Gogh style"]) is None
    assert known_concepts([]) is None
    with pytest.raises(ValueError, match="nothing is left"):
        build_grid([Erased(style, "style") for style in STYLES])


# --- the figures -----------------------------------------------------------------------------------------------------


def sample(part: str, thing: str, style: str, concept: Erased | None = None) -> EvaluationSample:
    return EvaluationSample(part, f"{thing} {style}", 0, thing, style, concept)


def test_figures_of_an_erased_style() -> None:
    judged = [
        (sample("target", "cat", "neon", NEON), Label("cat", "ink")),
        (sample("target", "fish", "neon", NEON), Label("fish", "neon")),
        (sample("target", "car", "neon", NEON), Label("other", "ink")),
        (sample("target", "tree", "neon", NEON), Label("tree", "sepia")),
        (sample("kept", "cat", "ink"), Label("cat", "ink")),
        (sample("kept", "fish", "flat"), Label("car", "flat")),
        (sample("paraphrase", "cat", "neon", NEON), Label("cat", "flat")),
        (sample("kept_paraphrase", "cat", "ink"), Label("cat", "flat")),
    ]
    figures = score(judged, [NEON])
    assert (figures["UA"], figures["IRA"], figures["CRA"], figures["CRA_target"]) == (0.75, 1.0, 0.5, 0.75)
    assert (figures["UA_paraphrase"], figures["IRA_paraphrase"], figures["CRA_paraphrase"]) == (1.0, 0.0, 1.0)
    assert figures["UA_synonym"] is None and figures["intervals"]["UA_synonym"] is None
    assert figures["intervals"]["UA"] == list(wilson(0.75, 4))
    assert figures["counts"]["IRA"] == 2
    assert figures["per_class"]["style"] == {"neon": 0.25, "ink": 1.0, "flat": 1.0}
    assert figures["per_class"]["object"] == {"cat": 1.0, "fish": 0.0}
    assert figures["confusion"] == {"neon": {"ink": 2, "neon": 1, "sepia": 1}}
    assert json.loads(json.dumps(figures)) == figures


def test_figures_of_an_erased_object_are_mirrored() -> None:
    judged = [
        (sample("target", "cat", "ink", CAT), Label("other", "ink")),
        (sample("target", "cat", "flat", CAT), Label("fish", "neon")),
        (sample("kept", "fish", "ink"), Label("fish", "flat")),
        (sample("kept", "car", "ink"), Label("cat", "ink")),
        (sample("synonym", "cat", "ink", CAT), Label("cat", "ink")),
    ]
    figures = score(judged, [CAT])
    assert (figures["UA"], figures["IRA"], figures["CRA"], figures["CRA_target"]) == (1.0, 0.5, 0.5, 0.5)
    assert figures["UA_synonym"] == 0.0
    assert figures["per_class"]["object"] == {"cat": 0.0, "fish": 1.0, "car": 0.0}


def test_figures_of_two_styles_and_an_object() -> None:
    judged = [
        (sample("target", "fish", "neon", NEON), Label("fish", "ink")),  # ink is erased too, but it is not neon
        (sample("target", "fish", "ink", INK), Label("cat", "ink")),
        (sample("target", "cat", "flat", CAT), Label("cat", "sepia")),
        (sample("target", "cat", "sepia", CAT), Label("fish", "sepia")),
        (sample("kept", "fish", "flat"), Label("fish", "sepia")),
    ]
    figures = score(judged, [NEON, INK, CAT])
    assert figures["UA"] == 0.5
    assert figures["per_concept"] == {"neon": 1.0, "ink": 0.0, "cat": 0.5}
    assert figures["CRA_target"] == 0.5  # fish, not fish, not flat, sepia
    # The kept image has its object and not its style: in kind for one concept of three, across for two.
    assert figures["IRA"] == pytest.approx(1 / 3)
    assert figures["CRA"] == pytest.approx(2 / 3)
    assert figures["confusion"]["cat"] == {"cat": 1, "fish": 1}


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MiniCanvas pipeline with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("random")
    tokenizer = write_tokenizer(path / "tokenizer")
    for name, part in zip(("text_encoder", "text_encoder_2"), networks.new_text_encoders(tokenizer), strict=True):
        part.save_pretrained(path / name)
    networks.new_vae().save_pretrained(path / "vae")
    networks.new_unet().save_pretrained(path / "unet")
    return path


def test_an_image_depends_on_its_prompt_and_seed_only(folder: Path) -> None:
    pipe = make_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    scheduler = pipe.scheduler
    prompts, seeds = ["a cat", "ink style", "a cat", ""], [188, 188, 288, 588]
    together = generate(pipe, prompts, seeds, steps=2, guidance=4.0, batch_size=4)
    assert together.shape == (4, 3, 64, 64) and together.dtype == torch.float32
    assert together.min() >= 0 and together.max() <= 1
    split = generate(pipe, prompts[::-1], seeds[::-1], steps=2, guidance=4.0, batch_size=3)
    torch.testing.assert_close(split.flip(0), together, atol=2e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3  # same seed, other prompt
    assert (together[0] - together[2]).abs().max() > 1e-3  # same prompt, other seed
    assert pipe.scheduler is scheduler
    assert generate(pipe, [], [], steps=2).shape == (0, 3, 64, 64)


def test_prompts_are_embedded_once_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    encode = generation.encode_prompts

    def record(pipe: StableDiffusionXLPipeline, texts: list[str]) -> PromptEmbeds:
        asked.append(texts)
        return encode(pipe, texts)

    monkeypatch.setattr(generation, "encode_prompts", record)
    pipe = make_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    generate(pipe, ["a cat"] * 3 + ["a fish"], [1, 2, 3, 4], steps=1, batch_size=2)
    assert asked == [["a cat", "a fish", ""]]


def test_a_plain_sd_pipeline_draws_too(folder: Path) -> None:
    parts = make_pipeline(folder)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=2, layers_per_block=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        parts.vae, parts.text_encoder, parts.tokenizer, unet, parts.scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    assert generate(pipe, ["a cat", "a fish"], [1, 2], steps=2).shape == (2, 3, 64, 64)


def test_the_first_latent_is_the_seeds_own(folder: Path) -> None:
    pipe = make_pipeline(folder)
    expected = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(288))
    assert torch.equal(initial_latents(pipe, [188, 288])[1], expected)


def test_prompts_and_seeds_must_pair_up(folder: Path) -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        generate(make_pipeline(folder), ["a", "b"], [1])


# --- evaluation and command ------------------------------------------------------------------------------------------


class FakeJudge:
    """Reads the verdict that `fake_generate` wrote into the first pixels."""

    def classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        codes = (images[:, 0, 0, :2] * 100).round().long()
        return torch.eye(11)[codes[:, 0]], torch.eye(8)[codes[:, 1]]

    def state_dict(self) -> dict[str, Tensor]:
        return {"weight": torch.zeros(2)}


class FakePipe:
    def __init__(self, edited: bool) -> None:
        self.edited = edited

    def to(self, device: str) -> FakePipe:
        return self


Run = Callable[..., dict]


@pytest.fixture
def drawn(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace drawing: the base shows what is asked; the edited model shows ink for neon. Returns who has drawn."""
    calls: list[str] = []

    def fake_generate(pipe: FakePipe, prompts: list[str], seeds: list[int], **_: object) -> Tensor:
        calls.append("after" if pipe.edited else "before")
        images = torch.zeros(len(prompts), 3, 1, 2)
        for i, prompt in enumerate(prompts):
            style = next(j for j, name in enumerate(STYLES) if name in prompt)
            if pipe.edited and STYLES[style] == "neon":
                style = STYLES.index("ink")
            images[i, 0, 0, 0] = next((j for j, name in enumerate(OBJECTS) if name in prompt), 10) / 100
            images[i, 0, 0, 1] = style / 100
        return images

    monkeypatch.setattr(evaluation, "generate", fake_generate)
    monkeypatch.setattr(evaluation, "load_pipeline", lambda path, unet_path=None: FakePipe(unet_path is not None))
    monkeypatch.setattr(minicanvas, "load_judge", lambda device="cpu": FakeJudge(), raising=False)
    monkeypatch.setattr(minicanvas, "pipeline_path", lambda: folder, raising=False)
    monkeypatch.setattr(quiet, "prepare_environment", lambda threads=0: None)  # it would set up this process for good
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def config(name: str = "neon style", output: str = "out") -> Config:
    return Config.model_validate({"concepts": [name], "output_dir": output})


def test_before_is_drawn_once_and_kept(drawn: list[str], folder: Path, tmp_path: Path) -> None:
    first = evaluation.evaluate_pair(config(), folder, tmp_path, progress=False)
    second = evaluation.evaluate_pair(config(), folder, tmp_path, progress=False)
    assert first == second
    assert drawn == ["before", "after", "after"]
    assert (first["before"]["UA"], first["after"]["UA"]) == (0.0, 1.0)
    assert first["after"]["IRA"] == first["after"]["CRA"] == first["after"]["CRA_target"] == 1.0
    assert first["after"]["protocol"]["num_inference_steps"] == 25
    evaluation.evaluate_pair(config("ink style"), folder, None, progress=False)
    assert drawn[3:] == ["before"]


@pytest.mark.parametrize("damage", ["", "{}", '[["cat", "neon"]]', "[1, 2"])
def test_a_damaged_cache_is_ignored(drawn: list[str], folder: Path, tmp_path: Path, damage: str) -> None:
    first = evaluation.evaluate_pair(config(), folder, None, progress=False)
    (file,) = (tmp_path / "cache" / "fastunlearn").iterdir()
    file.write_text(damage)
    assert evaluation.evaluate_pair(config(), folder, None, progress=False) == first
    assert drawn == ["before", "before"]


def test_an_unwritable_cache_costs_time_only(
    drawn: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert evaluation.evaluate_pair(config(), folder, None, progress=False)["before"]["UA"] == 0.0
    assert drawn == ["before", "before"]


def test_what_the_judge_cannot_know_is_refused(drawn: list[str], folder: Path, tmp_path: Path) -> None:
    def asked(concept: str, model: Path) -> Config:
        return Config.model_validate({"concepts": [concept], "model": {"pretrained_model_name_or_path": str(model)}})

    assert evaluation.why_not_evaluated(config()) is None
    assert evaluation.why_not_evaluated(asked("cat", folder)) is None
    assert "knows the objects" in (evaluation.why_not_evaluated(asked("Van Gogh style", folder)) or "")
    assert "MiniCanvas" in (evaluation.why_not_evaluated(asked("cat", tmp_path)) or "")
    with pytest.raises(UserError, match="knows the objects"):
        evaluation.evaluate_pair(asked("Van Gogh style", folder), folder, None)
    everything = Config.model_validate({"concepts": list(STYLES)})
    with pytest.raises(UserError, match="nothing is left"):
        evaluation.evaluate_pair(everything, folder, None)


def test_a_model_that_draws_something_else_is_not_judged(
    drawn: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the embedded model's sizes; what the classifier would say of its pictures is chance."""
    monkeypatch.setattr(evaluation, "generate", lambda _, prompts, *__, **___: torch.zeros(len(prompts), 3, 1, 2))
    with pytest.raises(evaluation.NotRecognised, match=r"the unedited model was asked to draw in \d+%"):
        evaluation.evaluate_pair(config(), folder, tmp_path, progress=False)


def finished_run(path: Path, folder: Path) -> Path:
    (path / "unet").mkdir(parents=True)
    (path / "config.toml").write_text(config(output=str(path)).to_toml())
    (path / "unet" / "config.json").write_text((folder / "unet" / "config.json").read_text())
    return path


def test_json_is_all_that_stdout_gets(
    drawn: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = finished_run(tmp_path / "out", folder)
    before = sorted(file.name for file in out.rglob("*"))
    assert command.run(Namespace(model=str(out), json=True, quick=True, full=False)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["after"]["UA"] == 1.0 and printed["after"]["protocol"]["quick"]
    assert json.loads((out / "evaluation.json").read_text()) == printed
    assert sorted(file.name for file in out.rglob("*")) == sorted([*before, "evaluation.json"])


def test_the_table_states_figures_intervals_and_what_was_drawn(
    drawn: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = finished_run(tmp_path / "out", folder)
    command.run(Namespace(model=str(out), json=False, quick=False, full=False))
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(len(line) for line in lines if not line.startswith(("prompts", "seeds"))) <= 100
    assert any(line.startswith("UA ") and "0.000" in line and "1.000" in line for line in lines)
    assert any(line.startswith("IRA ") and "(noise)" in line for line in lines)
    assert any(line.startswith("* neon") for line in lines)
    assert all(f"  {name}" in text for name in OBJECTS)
    assert "ink" in next(line for line in lines if line.startswith("  neon"))
    assert all(words in text for words in ("DDIM, eta 0, 25 steps, guidance 4", "188 288", "images:"))


def test_a_folder_that_is_no_run_is_one_clear_line(drawn: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model: .* has no config.toml") as caught:
        command.run(Namespace(model=str(tmp_path), json=False, quick=False, full=False))
    assert "\n" not in str(caught.value)
    (tmp_path / "config.toml").write_text(config().to_toml())
    with pytest.raises(UserError, match=r"has no unet/config\.json"):
        command.run(Namespace(model=str(tmp_path), json=False, quick=False, full=False))
    assert drawn == [] and not (tmp_path / "evaluation.json").exists()
