"""What is added to the package is one file and one line in `fastunlearn/registry.py`.

Each test writes such a file to a folder of its own, enters the line, and goes the whole way that a user goes: help,
refusals, planner, a run, and what the run leaves. Nothing of the package is touched.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
from extension import Extension, run_with
from safetensors.numpy import load_file

from fastunlearn.minicanvas import pipeline_path

UNET = "diffusion_pytorch_model.safetensors"
# The smallest run that there is.
QUICK = (
    "--concepts", "cat", "--max_train_steps", "2", "--sampler.num_inference_steps", "4", "--train.cpu_threads", "1",
    "--evaluation.mode", "off", "--evaluation.num_inference_steps", "2", "--report.num_validation_seeds", "1",
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
    push = ("--concepts", "cat", "--method", "push")
    help_, unknown, wrong, misspelt, refused, plan, trained = run_with(
        METHOD,
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
        EDIT,
        tmp_path,
        ("train", *mute, "--learning_rate", "1e-3"),
        ("plan", *mute, "--json"),
        ("train", *QUICK[:2], *QUICK[6:], "--method", "mute", "--mute.scale", "0.25", "--output_dir", str(out)),
    )

    why = "error: train.learning_rate: 0.001 has no meaning for method 'mute', which makes no updates; drop it\n"
    assert (refused.status, refused.err) == (2, why)
    assert plan.status == 0, plan.err
    assert json.loads(plan.out)["unet_evaluations"]["total"] == 0
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

from fastunlearn.engines.optimizers.base import FP32, OptimizerSpec


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
    help_, unknown, fused, sgd, adamw, trained = run_with(
        OPTIMIZER,
        tmp_path,
        ("train", "--help"),
        ("train", *QUICK, "--optimizer.name", "sdg"),
        ("train", *chosen, "--engine", "fused", "--output_dir", str(tmp_path / "refused")),
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
