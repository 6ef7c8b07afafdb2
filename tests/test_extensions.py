"""What is added to the package is one file and one line in `fastunlearn/registry.py`.

Each test writes such a file to a folder of its own, enters the line, and goes the whole way that a user goes: help,
refusals, planner, a run, and what the run leaves. Nothing of the package is touched.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from extension import Extension, run_with
from safetensors.numpy import load_file

from fastunlearn.commands.evaluate import drawn_lines
from fastunlearn.errors import UserError
from fastunlearn.evaluation.metrics.scores import score
from fastunlearn.minicanvas import pipeline_path
from fastunlearn.registry import METRICS, Registry

UNET = "diffusion_pytorch_model.safetensors"
# The smallest run that there is.
QUICK = (
    "--concepts", "cat", "--max_train_steps", "2", "--sampler.num_inference_steps", "4", "--train.cpu_threads", "1",
    "--evaluation.mode", "off", "--evaluation.num_inference_steps", "2", "--report.num_validation_seeds", "1",
    "--progress.enabled", "false",
    "--report.report_to", "none",
)  # fmt: skip

METHOD = Extension(
    "METHODS",
    "push",
    "Push",
    '''
"""A method: away from the concept's prediction, at uniformly drawn steps."""

from fastunlearn.errors import UserError
from fastunlearn.methods.base import Method, MethodOutput, MethodSpec, UNetCalls, frozen_predictions, guided_prediction
from fastunlearn.sampling.key_steps import uniform_table
from fastunlearn.schema.fields import ConfigModel, PositiveFloat


class PushConfig(ConfigModel):
    """A toy."""

    strength: PositiveFloat = 1.0
    """How far from the concept."""


class PushSpec(MethodSpec):
    title = "Push, a toy"
    paper = "0000.00000"
    Settings = PushConfig
    steps = 321
    scope = "selfattn"

    def calls(self, cfg):
        return UNetCalls(teacher=2, trained=1)

    def refuse(self, cfg):
        if cfg.push.strength > 10:
            raise UserError(f"push.strength: {cfg.push.strength} is too far; use at most 10")

    def facts(self, cfg):
        return [("pushed by", f"{cfg.push.strength:g}")]

    def memory_rows(self, cfg, latent_channels, latent_size):
        return [("what the toy holds", 1 << 20)]


class Push(Method):
    spec = PushSpec()

    def table(self):
        cfg = self.cfg
        return uniform_table(len(cfg.concepts), cfg.sampler.num_inference_steps, cfg.max_train_steps, cfg.seed)

    def loss(self, models, batch):
        from torch.nn.functional import mse_loss

        cond, anchor = frozen_predictions(models, batch, "cond", "anchor")
        target = anchor.float() - self.cfg.push.strength * (cond.float() - anchor.float())
        (prediction,) = models.train(batch.latents, batch.timesteps, batch.trained)
        return MethodOutput(mse_loss(prediction.float(), target), guided_prediction(models, batch, prediction, None))
''',
)


def test_a_method_is_one_file_and_one_line(tmp_path: Path) -> None:
    """Its section, defaults, refusals, calls, memory, loss and card facts reach every place that asks for them."""
    out = tmp_path / "run"
    push = ("--concepts", "cat", "--method", "push", "--surgery.enabled", "false")
    help_, unknown, wrong, misspelt, refused, plan, trained = run_with(
        [METHOD],
        tmp_path,
        ("train", "--help"),
        ("train", "--concepts", "cat", "--method", "pusch"),
        ("train", *push, "--push.strength", "0"),
        ("train", *push, "--push.strenght", "1"),
        ("train", *push, "--push.strength", "11"),
        ("plan", *push, "--json"),
        ("train", *QUICK, "--method", "push", "--push.strength", "2.5", "--output_dir", str(out)),
    )

    assert help_.status == 0
    assert "--push.strength" in help_.out and "How far from the concept." in help_.out
    expected = {
        unknown: "error: method: 'pusch' is not allowed; allowed are 'kscu', 'esd', 'doco', 'sdd', 'uce', 'rece' or "
        "'push' (nearest: push)",
        wrong: "error: push.strength: 0 is not allowed; it must be greater than 0.0",
        misspelt: "error: --push.strenght: unknown option (nearest: --push.strength)",
        refused: "error: push.strength: 11.0 is too far; use at most 10",
    }
    for done, line in expected.items():
        assert (done.status, done.err) == (2, line + "\n")

    assert plan.status == 0, plan.err
    planned = json.loads(plan.out)
    assert "what the toy holds" in {row["name"] for row in planned["rows"]}
    evaluations = planned["unet_evaluations"]
    assert evaluations["student_backward"] == 321 and evaluations["teacher"] == 2 * 321

    assert trained.status == 0, trained.err
    config = tomllib.loads((out / "config.toml").read_text())
    assert config["push"] == {"strength": 2.5} and config["train"]["scope"] == "selfattn"
    log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and all(entry["loss"] > 0 for entry in log)
    card = (out / "README.md").read_text()
    assert "Push, a toy (arXiv:0000.00000)" in card and "pushed by" in card and "2.5" in card


EDIT = Extension(
    "METHODS",
    "mute",
    "Mute",
    '''
"""A method in closed form: the keys of the cross-attentions, scaled."""

from fastunlearn.methods.edit import EditMethod, EditSpec
from fastunlearn.schema.fields import ConfigModel, Fraction


class MuteConfig(ConfigModel):
    """A toy."""

    scale: Fraction = 0.5
    """What is left of the keys."""


class MuteSpec(EditSpec):
    title = "Mute, a toy"
    paper = "0000.00001"
    Settings = MuteConfig


class Mute(EditMethod):
    spec = MuteSpec()

    def edit(self, pipeline, device):
        scale, named = self.cfg.mute.scale, pipeline.unet.named_parameters()
        return {name: scale * p.detach().float() for name, p in named if name.endswith("attn2.to_k.weight")}
''',
)


def test_a_method_in_closed_form_is_one_file_and_one_line(tmp_path: Path) -> None:
    """It makes no updates, so that settings of a training are refused, and what it leaves is the edit."""
    out = tmp_path / "run"
    mute = ("--concepts", "cat", "--method", "mute")
    refused, plan, edited = run_with(
        [EDIT],
        tmp_path,
        ("train", *mute, "--learning_rate", "1e-3"),
        ("plan", *mute, "--json"),
        ("train", *QUICK[:2], *QUICK[6:], "--method", "mute", "--mute.scale", "0.25", "--output_dir", str(out)),
    )

    why = "error: train.learning_rate: 0.001 has no meaning for method 'mute', which makes no updates; drop it\n"
    assert (refused.status, refused.err) == (2, why)
    assert plan.status == 0, plan.err
    evaluations = json.loads(plan.out)["unet_evaluations"]
    assert evaluations["total"] == evaluations["probe"]
    assert edited.status == 0, edited.err
    assert tomllib.loads((out / "config.toml").read_text())["mute"] == {"scale": 0.25}
    original, found = (load_file(folder / "unet" / UNET) for folder in (pipeline_path(), out))
    for name, weight in original.items():
        left = 0.25 if name.endswith("attn2.to_k.weight") else 1.0
        np.testing.assert_allclose(found[name], left * weight, atol=1e-6)
    assert "Mute, a toy (arXiv:0000.00001)" in (out / "README.md").read_text()


OPTIMIZER = Extension(
    "OPTIMIZERS",
    "sgd",
    "SPEC",
    '''
"""torch's SGD with momentum."""

from fastunlearn.engines.optimizers.base import OptimizerSpec
from fastunlearn.utils.memory_rows import FP32


class SGD(OptimizerSpec):
    name = "sgd"

    def build(self, groups, config, learning_rate):
        import torch

        return torch.optim.SGD(groups, lr=learning_rate, momentum=config.adam_beta1, foreach=False)

    def state_bytes(self, numel, bits, sharded):
        return numel * FP32, 0


SPEC = SGD()
''',
)


def test_an_optimizer_is_one_file_and_one_line(tmp_path: Path) -> None:
    """Its name, its refusal by the fused engine, its memory and its steps reach every place that asks for them."""
    out, chosen = tmp_path / "run", (*QUICK, "--optimizer.name", "sgd")
    help_, unknown, fused, weighed, sgd, adamw, trained = run_with(
        [OPTIMIZER],
        tmp_path,
        ("train", "--help"),
        ("train", *QUICK, "--optimizer.name", "sdg"),
        ("train", *chosen, "--engine", "fused", "--output_dir", str(tmp_path / "refused")),
        ("train", *chosen, "--surgery.enabled", "true", "--surgery.metric", "optimizer"),
        ("plan", *chosen, "--json"),
        ("plan", *QUICK, "--json"),
        ("train", *chosen, "--zero.stage", "1", "--output_dir", str(out)),
    )
    assert help_.status == 0 and "--optimizer.name" in help_.out
    expected = {
        unknown: "error: optimizer.name: 'sdg' is not allowed; allowed are 'adamw', 'adamw8bit', 'paged_adamw8bit' or "
        "'sgd' (nearest: sgd)",
        fused: "error: optimizer.name: 'sgd' is for engine 'zero'; with 'fused' use 'adamw8bit' and "
        "fused.offload_optimizer 'cpu'",
        weighed: "error: surgery.metric: 'optimizer' weighs by a second moment, and 'sgd' keeps none; use 'raw'",
    }
    for done, line in expected.items():
        assert (done.status, done.err) == (2, line + "\n")
    assert not (tmp_path / "refused").exists()
    # AdamW has two moments where this has one, and a count of steps for each of the two groups.
    assert 2 * state_bytes(sgd.out, "sgd") == state_bytes(adamw.out, "adamw") - 2 * 4

    assert trained.status == 0, trained.err
    assert tomllib.loads((out / "config.toml").read_text())["optimizer"]["name"] == "sgd"
    log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and all(entry["loss"] > 0 for entry in log)
    assert ", sgd |" in (out / "README.md").read_text()


def state_bytes(plan: str, name: str) -> int:
    """Of optimizer state, in a plan."""
    (size,) = (row["device"] for row in json.loads(plan)["rows"] if row["name"] == f"optimizer state ({name})")
    return int(size)


FORMAT = Extension(
    "FORMATS",
    "names",
    "FORMAT",
    '''
"""An export format: the names of the changed tensors."""

from fastunlearn.export.formats.base import ExportFormat
from fastunlearn.utils.files import atomic_write_text


class Names(ExportFormat):
    title = "which tensors changed"
    path = "names.txt"

    def disk_bytes(self, unet_bytes, trained):
        return 1 << 16

    def write(self, export):
        atomic_write_text(export.folder / self.path, "\\n".join(sorted(export.changed)) + "\\n")


FORMAT = Names()
''',
)
METRIC = Extension(
    "METRICS",
    "drawn",
    "METRIC",
    '''
"""A metric that looks at the pictures themselves."""

from fastunlearn.evaluation.metrics.base import Metric


class Drawn(Metric):
    short = "kept: not one flat colour"
    meaning = "kept pictures that are not one flat colour"
    needs_images = True

    def values(self, evaluated):
        pairs = zip(evaluated.samples, evaluated.images, strict=True)
        return [float(image.std() > 0.01) for sample, image in pairs if sample.part == "kept"]


METRIC = Drawn()
''',
)
CLASSIFIER = Extension(
    "CLASSIFIERS",
    "colours",
    "CLASSIFIER",
    '''
"""A classifier of one concept, on pictures of any model."""

from fastunlearn.evaluation.classifiers.base import Classifier, Label, LoadedClassifier
from fastunlearn.evaluation.pictures.grid import Erased, EvaluationGrid, EvaluationSample

CONCEPT = Erased("ink", "style")


class Colours(Classifier):
    title = "the colours of all pixels"
    limits = "It tells grey from colourful, and nothing else."

    def why_not(self, cfg):
        names = [concept.name for concept in cfg.concepts]
        return None if names == ["ink style"] else "it knows \'ink style\' only"

    def grid(self, cfg, quick=False):
        asked = [("target", "a house in ink style", "ink", CONCEPT), ("kept", "a house in popart style", "day", None)]
        samples = [EvaluationSample(part, prompt, seed, "house", style, concept)
                 for part, prompt, style, concept in asked for seed in (1, 2)]
        steps = cfg.evaluation.num_inference_steps
        return EvaluationGrid("colours-1", (CONCEPT,), tuple(samples), steps, 4.0, quick)

    def load(self, device):
        return Loaded()


class Loaded(LoadedClassifier):
    def look(self, images):
        return [Label("house", "ink" if image.std(0).mean() < 0.1 else "day") for image in images]

    def knows(self, label):
        return label.style in ("ink", "day")

    def digest(self):
        return b"colours"


CLASSIFIER = Colours()
''',
)
ATTACK = Extension(
    "ATTACKS",
    "biases",
    "ATTACK",
    '''
"""An attack on the biases alone."""

from fastunlearn.evaluation.attacks.weights import Weights


class Biases(Weights):
    title = "the biases of the U-Net"
    rate_factor = 7.0

    def names(self, unet):
        return [name for name, _ in unet.named_parameters() if name.endswith(".bias")]


ATTACK = Biases()
''',
)


def test_a_format_a_metric_a_classifier_and_an_attack_are_one_file_and_one_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They reach help, refusals, planner, what a run leaves, its figures and card, and the relearning test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "run"
    few = (*QUICK[2:8], *QUICK[12:], "--retain.num_inference_steps", "2")
    base = (
        "--concepts",
        "ink style",
        *few,
        "--evaluation.num_inference_steps",
        "8",
    )  # enough for the colours of what was asked for
    chosen = (
        "--export.formats", "unet; names", "--evaluation.metrics", "UA; IRA; drawn",
        "--evaluation.classifier", "colours",
    )  # fmt: skip
    attack = ("--steps", "0,1", "--seeds", "1", "--batch_size", "2", "--num_images", "2", "--json")
    help_, relearn_help, no_format, no_metric, no_classifier, no_attack, plan, trained, evaluated, attacked = run_with(
        [FORMAT, METRIC, CLASSIFIER, ATTACK],
        tmp_path,
        ("train", "--help"),
        ("relearn", "--help"),
        ("train", *base, "--export.formats", "unet; nams"),
        ("train", *base, "--evaluation.metrics", "UA; drown"),
        ("train", *base, "--evaluation.classifier", "color"),
        ("relearn", "--model", str(out), "--attack", "biasses"),
        ("plan", *base, *chosen, "--json"),
        ("train", *base, *chosen, "--output_dir", str(out)),
        ("evaluate", "--model", str(out), "--json"),
        ("relearn", "--model", str(out), "--attack", "biases", *attack),
    )
    for option in ("--export.formats", "--evaluation.metrics", "--evaluation.classifier"):
        assert option in help_.out
    asked = " ".join(relearn_help.out.split())
    assert "biases: the biases of the U-Net" in asked
    assert "lora 10 times, textual-inversion 100 times, biases 7 times that" in asked
    refused = {
        no_format: "error: export.formats[1]: 'nams' is not allowed; allowed are 'unet', 'delta' or 'names' "
        "(nearest: names)",
        no_metric: "error: evaluation.metrics[1]: 'drown' is not allowed; allowed are 'UA', 'IRA', 'CRA', "
        "'CRA_target', 'UA_paraphrase', 'IRA_paraphrase', 'CRA_paraphrase', 'UA_synonym' or 'drawn' (nearest: drawn)",
        no_classifier: "error: evaluation.classifier: 'color' is not allowed; allowed are 'auto', 'minicanvas' or "
        "'colours' (nearest: colours)",
        no_attack: "error: --attack: 'biasses' is unknown; allowed are full, attn, lora, textual-inversion, biases "
        "(nearest: biases)",
    }
    for done, line in refused.items():
        assert (done.status, done.err) == (2, line + "\n")
    assert plan.status == 0, plan.err

    assert trained.status == 0, trained.err
    names = (out / "names.txt").read_text().split()
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight" in names
    assert not (out / "delta.safetensors").exists() and (out / "unet").is_dir()
    figures = json.loads((out / "metrics.json").read_text())["evaluation"]
    assert figures["after"]["drawn"] == 1.0 and figures["after"]["counts"] == {"UA": 2, "IRA": 2, "drawn": 2}
    assert "CRA" not in figures["after"]
    protocol = figures["after"]["protocol"]
    assert protocol["name"] == "colours-1" and protocol["images"] == {"target": 2, "kept": 2}
    assert "template" not in protocol and "paraphrases" not in protocol, "MiniCanvas' wordings are not its own"
    assert not [line for line in drawn_lines(protocol) if line.startswith("prompts:")]
    card = (out / "README.md").read_text()
    for text in (
        "* `names.txt`: which tensors changed", "drawn: kept pictures that are not one flat colour",
        "Judged by the colours of all pixels", "It tells grey from colourful, and nothing else.",
    ):  # fmt: skip
        assert text in card
    assert evaluated.status == 0, evaluated.err
    assert json.loads(evaluated.out)["after"] == figures["after"]
    assert attacked.status == 0, attacked.err
    again = json.loads(attacked.out)
    assert again["attack"] == "biases" and again["optimizer"]["learning_rate"] == pytest.approx(7e-4)
    assert len(again["runs"][0]["UA"]) == 2 and again["runs"][0]["error"][0] != again["runs"][0]["error"][1]


def test_a_method_without_its_paper_is_one_line(tmp_path: Path) -> None:
    """It is found before anything else, wherever the user starts."""
    unfinished = Extension("METHODS", "push", "Push", METHOD.source.replace('paper = "0000.00000"', ""))
    for done in run_with([unfinished], tmp_path, ("train", "--help"), ("plan", "--concepts", "cat")):
        line = "error: method: 'push' (toy_push:Push) cannot be used: it lacks spec.paper; see its base class\n"
        assert (done.status, done.err) == (2, line)


@pytest.mark.parametrize(
    ("source", "entry", "what"),
    [
        (METRIC.source, "METRIK", "toy_part has no 'METRIK' (nearest: METRIC)"),
        (METRIC.source.replace('short = "kept: not one flat colour"', ""), "METRIC", "it lacks short; see its base"),
        (METRIC.source.replace("def values", "def value"), "METRIC", "Can't instantiate abstract class Drawn"),
        (METHOD.source.replace("def loss", "def los"), "Push", "it lacks loss; see its base class"),
        (METHOD.source.replace("spec = PushSpec()", ""), "Push", "it lacks spec; see its base class"),
        (None, "METRIC", "there is no module toy_part"),
    ],
)
def test_an_unfinished_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None, entry: str, what: str
) -> None:
    """It names the entry, the file and what is missing; a library that the file itself lacks is not its mistake."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toy_part", raising=False)
    if source is not None:
        (tmp_path / "toy_part.py").write_text(source, encoding="utf-8")
    known = Registry("some.field", {"toy": f"toy_part:{entry}"})
    with pytest.raises(UserError, match=re.escape(f"some.field: 'toy' (toy_part:{entry}) cannot be used: {what}")):
        known["toy"]
    if source is not None:
        (tmp_path / "toy_needs.py").write_text("import no_such_library", encoding="utf-8")
        with pytest.raises(ModuleNotFoundError, match="no_such_library"):
            Registry("some.field", {"toy": "toy_needs:X"})["toy"]


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_a_metric_outside_0_to_1_is_one_line(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(METRICS["UA"], "values", lambda _: [1.0, value])
    line = rf"evaluation.metrics: 'UA' \(.*:UA\) cannot be used: it gives a picture the value {value:g}; from 0 to 1"
    with pytest.raises(UserError, match=line):
        score([], [], ["UA"])
