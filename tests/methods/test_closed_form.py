"""UCE and RECE against their papers' equations: loops over tokens and layers, and autograd, all in fp64."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from safetensors.torch import load_file
from tiny import TEXT_WIDTH, tiny_prompts, tiny_unet
from torch import Tensor

from fastunlearn import cli
from fastunlearn.config import Config, load_config
from fastunlearn.errors import UserError
from fastunlearn.methods.parts import concept_edit
from fastunlearn.methods.parts.closed_form import EditWeights, Tokens, edit_weights, erase, gram, solve_evoking_tokens
from fastunlearn.methods.parts.concept_edit import (
    Text,
    collect_tokens,
    edit_pipeline,
    edited_weights,
    encode,
    put_in_place,
)
from fastunlearn.methods.tables import build_method
from fastunlearn.methods.uce import UCE
from fastunlearn.minicanvas import pipeline_path
from fastunlearn.models.loading import load_pipeline
from fastunlearn.models.parameter_names import trainable_names
from fastunlearn.models.pipeline import encode_prompts

WIDTH, OUTPUTS = 7, (5, 4, 9)
CPU = torch.device("cpu")
WEIGHTS = EditWeights(erase=1.7, preserve=0.6, regularisation=0.4)
ROOT = Path(__file__).resolve().parents[2]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def some_tokens(erased: int = 3, preserved: int = 4) -> Tokens:
    return Tokens(draw(erased, WIDTH), draw(erased, WIDTH), draw(preserved, WIDTH))


def some_layers() -> list[Tensor]:
    return [draw(rows, WIDTH) for rows in OUTPUTS]


def objective(w: Tensor, start: Tensor, original: Tensor, tokens: Tokens, weights: EditWeights) -> Tensor:
    """UCE's, literally: a sum over tokens."""
    total = weights.regularisation * (w - start).square().sum()
    for c, a in zip(tokens.erased, tokens.anchors, strict=True):
        total = total + weights.erase * (w @ c - original @ a).square().sum()
    for p in tokens.preserved:
        total = total + weights.preserve * (w @ p - original @ p).square().sum()
    return total


def literal_uce(original: Tensor, tokens: Tokens, weights: EditWeights) -> Tensor:
    """Equation 7 of the paper, token by token, with an explicit inverse."""
    left, right = weights.regularisation * original.clone(), weights.regularisation * torch.eye(WIDTH).double()
    for c, a in zip(tokens.erased, tokens.anchors, strict=True):
        left += weights.erase * torch.outer(original @ a, c)
        right += weights.erase * torch.outer(c, c)
    for p in tokens.preserved:
        left += weights.preserve * torch.outer(original @ p, p)
        right += weights.preserve * torch.outer(p, p)
    return left @ torch.linalg.inv(right)


@pytest.mark.parametrize(("erased", "preserved"), [(1, 0), (3, 4), (20, 30)])
def test_the_edit_is_equation_7_of_uce(erased: int, preserved: int) -> None:
    tokens, layers = some_tokens(erased, preserved), some_layers()
    found = erase(tokens, WEIGHTS)
    for layer in layers:
        torch.testing.assert_close(layer @ found, literal_uce(layer, tokens, WEIGHTS), rtol=1e-9, atol=1e-9)


def test_it_minimises_the_objective() -> None:
    """No gradient where it lands, and a descent by LBFGS lands there too."""
    tokens, layer = some_tokens(), draw(5, WIDTH)
    solution = (layer @ erase(tokens, WEIGHTS)).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(solution, layer, layer, tokens, WEIGHTS), solution)
    assert gradient.abs().max() < 1e-10
    guess = layer.clone().requires_grad_()
    precise: dict = {"tolerance_grad": 1e-12, "tolerance_change": 1e-16, "line_search_fn": "strong_wolfe"}
    descent = torch.optim.LBFGS([guess], max_iter=500, **precise)

    def closure() -> Tensor:
        descent.zero_grad()
        loss = objective(guess, layer, layer, tokens, WEIGHTS)
        loss.backward()
        return loss

    descent.step(closure)
    torch.testing.assert_close(guess.detach(), solution.detach(), rtol=1e-4, atol=1e-5)


def test_from_another_start_it_minimises_the_objective_that_holds_to_that_start() -> None:
    layer, start = draw(5, WIDTH), erase(some_tokens(2, 1), WEIGHTS)
    tokens = some_tokens()
    solution = (layer @ erase(tokens, WEIGHTS, start=start)).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(solution, layer @ start, layer, tokens, WEIGHTS), solution)
    assert gradient.abs().max() < 1e-10


def test_the_derived_token_evokes_most_over_all_layers() -> None:
    """RECE: stationary under autograd, and equal to the sums of the paper, layer by layer."""
    layers, text_map, c, lam = some_layers(), erase(some_tokens(), WEIGHTS), draw(2, WIDTH), 0.3
    derived = solve_evoking_tokens(c, text_map, gram(layers, CPU), lam).requires_grad_()
    answers = [(layer @ text_map, layer) for layer in layers]
    loss = lam * derived.square().sum()
    for new, old in answers:
        loss = loss + (derived @ new.T - c @ old.T).square().sum()
    (gradient,) = torch.autograd.grad(loss, derived)
    assert gradient.abs().max() < 1e-10
    left, right = lam * torch.eye(WIDTH).double(), torch.zeros(WIDTH, 2).double()
    for new, old in answers:
        left += new.T @ new
        right += new.T @ old @ c.T
    torch.testing.assert_close(derived.detach(), (torch.linalg.inv(left) @ right).T, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("start", [False, True], ids=["from the original", "from an edit"])
def test_fixed_tokens_are_held_exactly_and_the_rest_is_the_minimum_that_leaves_them(start: bool) -> None:
    """The oracle solves the objective with a multiplier for each fixed token, layer by layer."""
    tokens = replace(some_tokens(), fixed=draw(2, WIDTH))
    before = erase(replace(some_tokens(2, 1), fixed=tokens.fixed), WEIGHTS) if start else torch.eye(WIDTH).double()
    found = erase(tokens, WEIGHTS, start=before if start else None)
    c, a, p, b = tokens.erased, tokens.anchors, tokens.preserved, tokens.fixed
    assert b is not None
    torch.testing.assert_close(found @ b.T, b.T, rtol=1e-9, atol=1e-9)
    for layer in some_layers():
        e, r, lam = WEIGHTS.erase, WEIGHTS.preserve, WEIGHTS.regularisation
        normal = e * c.T @ c + r * p.T @ p + lam * torch.eye(WIDTH).double()
        wanted = layer @ (e * a.T @ c + r * p.T @ p + lam * before)
        system = torch.cat([torch.cat([normal, b.T], 1), torch.cat([b, torch.zeros(2, 2).double()], 1)])
        literal = torch.linalg.solve(system, torch.cat([wanted, layer @ b.T], 1), left=False)[:, :WIDTH]
        torch.testing.assert_close(layer @ found, literal, rtol=1e-8, atol=1e-9)


def literal_rece(layers: list[Tensor], tokens: Tokens, cfg: Config) -> list[Tensor]:
    """All rounds, each layer solved for itself; the target of c is a + g (a - c)."""
    uce, rece = cfg.uce, cfg.rece
    pairs = [(c, a + uce.negative_guidance * (a - c)) for c, a in zip(tokens.erased, tokens.anchors, strict=True)]
    aims = [a for _, a in pairs]

    def solve(now: list[Tensor], pairs: list[tuple[Tensor, Tensor]], scales: EditWeights) -> list[Tensor]:
        new = []
        for w, original in zip(now, layers, strict=True):
            top, bottom = scales.regularisation * w, scales.regularisation * torch.eye(WIDTH).double()
            for weight, c, a in [
                *((scales.erase, c, a) for c, a in pairs), *((scales.preserve, p, p) for p in tokens.preserved)
            ]:  # fmt: skip
                top, bottom = top + weight * torch.outer(original @ a, c), bottom + weight * torch.outer(c, c)
            new.append(torch.linalg.solve(bottom, top, left=False))
        return new

    now = solve(layers, pairs, EditWeights(uce.erase_scale, uce.preserve_scale, uce.regularisation))
    for _ in range(rece.rounds):
        left = rece.embedding_regularisation * torch.eye(WIDTH).double() + sum(w.T @ w for w in now)
        right = torch.stack([w.T @ original for w, original in zip(now, layers, strict=True)]).sum(0)
        rows = range(len(aims)) if rece.tokens == "all" or tokens.own is None else tokens.own.tolist()
        derived = [torch.linalg.solve(left, right @ tokens.erased[row]) for row in rows]
        new = list(zip(derived, [aims[row] for row in rows], strict=True))
        pairs = [*pairs, *new] if rece.cumulative else new
        now = solve(now, pairs, EditWeights(rece.erase_scale, rece.preserve_scale, rece.regularisation))
    return now


def config(method: str, **fields: object) -> Config:
    return Config.model_validate({"method": method, "concepts": ["neon style"], **fields})


def closed_form(cfg: Config) -> UCE:
    method = build_method(cfg)
    assert isinstance(method, UCE) and method.spec.closed_form and method.table() == []
    return method


@pytest.mark.parametrize("which", ["name", "all"])
@pytest.mark.parametrize("cumulative", [True, False])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_rece_is_its_rounds(rounds: int, cumulative: bool, which: str) -> None:
    rece = {"tokens": which, "rounds": rounds, "cumulative": cumulative, "embedding_regularisation": 0.3,
            "erase_scale": 1.3, "preserve_scale": 0.2, "regularisation": 0.7}  # fmt: skip
    cfg = config("rece", rece=rece, uce={"erase_scale": 0.9, "preserve_scale": 0.5, "negative_guidance": 0.4})
    tokens, layers = replace(some_tokens(), own=torch.tensor([1])), some_layers()
    projections = {str(number): layer for number, layer in enumerate(layers)}
    found = closed_form(cfg).text_map(tokens, projections)
    for layer, literal in zip(layers, literal_rece(layers, tokens, cfg), strict=True):
        torch.testing.assert_close(layer @ found, literal, rtol=1e-7, atol=1e-8)


def test_published_uce_is_equation_7_and_the_default_goes_beyond_the_anchor() -> None:
    tokens, layer = some_tokens(), draw(5, WIDTH)
    published = closed_form(config("uce", uce={"negative_guidance": 0.0})).text_map(tokens, {"w": layer})
    literal = literal_uce(layer, tokens, EditWeights(1.0, 1.0, 0.5))
    torch.testing.assert_close(layer @ published, literal, rtol=1e-9, atol=1e-9)
    further = Tokens(tokens.erased, 2 * tokens.anchors - tokens.erased, tokens.preserved)
    literal = literal_uce(layer, further, EditWeights(1.0, 1.0, 0.5))
    default = closed_form(config("uce")).text_map(tokens, {"w": layer})
    torch.testing.assert_close(layer @ default, literal, rtol=1e-9, atol=1e-9)


UNRELATED = ["two boats on a lake", "a bowl of fruit"]


@pytest.fixture(scope="module")
def with_zeros(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random SDXL whose unconditional prompt is zeros."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    assert cli.main(["doctor", "--make-random", "tiny-sdxl", str(folder)]) == 0
    pipeline = load_pipeline(folder)
    assert pipeline.config["force_zeros_for_empty_prompt"]
    return pipeline


@pytest.mark.parametrize("keep", [0, 1, 7])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("method", ["uce", "rece"])
def test_an_empty_anchor_is_encoded_where_zeros_are_the_unconditional(
    method: str, guidance: float, keep: int, with_zeros: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["Monet style", "a dog", "a house", "watercolor style", "a red car", "the sea at night", "a portrait"][:keep]
    prompts = {"templates": ["{concept}"], "anchor_templates": [""]}
    model = {"pretrained_model_name_or_path": "random"}
    cfg = config(method, keep=kept, prompts=prompts, uce={"negative_guidance": guidance}, model=model)
    text = encode(with_zeros, [*UNRELATED, "neon style", ""], CPU)
    assert text.hidden[""].abs().min() > 0

    def change(edited: dict[str, Tensor], tokens: Tensor) -> float:
        """Of keys and values, relative."""
        before = torch.cat([with_zeros.unet.get_parameter(name).detach() for name in edited]).double()
        after = torch.cat(list(edited.values())).double()
        return float((tokens @ (after - before).T).norm() / (tokens @ before.T).norm())

    edited = edit_pipeline(cfg, closed_form(cfg), with_zeros, CPU)
    assert change(edited, text.hidden[""][:1]) < 1e-5  # the first token, which is the same in every prompt
    assert change(edited, text.hidden["neon style"][2:3]) > 0.3
    zeros = with_empty_as_zeros(with_zeros, monkeypatch)
    others = torch.cat([text.hidden[prompt] for prompt in UNRELATED])
    assert change(edited, others) < 0.6 * change(edit_pipeline(cfg, closed_form(cfg), zeros, CPU), others)


def with_empty_as_zeros(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The edit sees zeros for the empty prompt, and may change every token: as it once was."""
    monkeypatch.setattr(concept_edit, "encode_prompts", lambda *given, **_: encode_prompts(*given))
    collect = concept_edit.collect_tokens
    monkeypatch.setattr(concept_edit, "collect_tokens", lambda *given: replace(collect(*given), fixed=None))
    return pipeline


def test_what_comes_out_is_fp32_and_close_to_the_exact_edit() -> None:
    layer, text_map = draw(5, WIDTH), erase(some_tokens(), WEIGHTS)
    edited = edit_weights({"w": layer.bfloat16()}, text_map)["w"]
    assert edited.dtype == torch.float32
    torch.testing.assert_close(edited, (layer.bfloat16().double() @ text_map).float())


# Which tokens enter: five positions; prompts of one and of three words.
PROMPT_TABLE = tiny_prompts(
    ["neon style", "cat"], templates=["{concept}", "a {concept} x"], anchor_templates=["", "a x"]
)


def some_text() -> Text:
    words = {text: len(text.split()) for text in PROMPT_TABLE.texts}
    return Text({text: draw(7, WIDTH) for text in PROMPT_TABLE.texts}, words)


def test_every_concept_and_prompt_enters_with_its_anchor() -> None:
    text = some_text()
    hidden = text.hidden
    assert len(collect_tokens(text, PROMPT_TABLE, "all").erased) == 4 * 7
    last = collect_tokens(text, PROMPT_TABLE, "last")
    assert torch.equal(last.erased[0], hidden["neon style"][2]) and torch.equal(last.anchors[0], hidden[""][0])
    assert torch.equal(last.erased[3], hidden["a cat x"][3]) and torch.equal(last.anchors[3], hidden["a x"][2])
    tail = collect_tokens(text, PROMPT_TABLE, "tail")
    assert torch.equal(tail.erased[:5], hidden["neon style"][2:]) and torch.equal(tail.anchors[:5], hidden[""][:5])
    assert tail.preserved.shape == (0, WIDTH)
    assert tail.own is None
    for which, rows in (("all", [2]), ("tail", [0]), ("last", [0])):
        named = collect_tokens(text, PROMPT_TABLE, which, ["neon style"])
        assert named.own is not None and named.own.tolist() == rows
        assert torch.equal(named.of_the_name().erased[0], hidden["neon style"][2])


@pytest.mark.parametrize(("which", "rows"), [("all", slice(0, 7)), ("tail", slice(2, 7)), ("last", slice(2, 3))])
def test_the_kept_prompts_are_preserved(which: str, rows: slice) -> None:
    text = Text({"ink style": draw(7, WIDTH)}, {"ink style": 2})
    assert torch.equal(text.of_kept("ink style", which), text.hidden["ink style"][rows])


def test_only_keys_and_values_of_the_cross_attentions_change_and_the_unet_has_what_is_returned() -> None:
    unet = tiny_unet()
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    tokens = Tokens(*(torch.randn(rows, TEXT_WIDTH, dtype=torch.float64) for rows in (3, 3, 2)))
    edited = edited_weights(unet, closed_form(config("uce")), tokens)
    put_in_place(unet, edited)
    after = dict(unet.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(edited)
    assert set(edited) == set(trainable_names(unet, "attn2_kv"))
    assert all(torch.equal(after[name], weight) for name, weight in edited.items())


REFUSED = [
    (["--surgery.enabled", "true"], ("surgery.enabled", "'uce'", "no updates")),
    (["--max_train_steps", "3"], ("train.max_train_steps", "3", "no updates")),
    (["--learning_rate", "1e-3"], ("train.learning_rate", "no updates")),
    (["--zero_stage", "2"], ("zero.stage", "2", "no updates")),
    (["--use_8bit_adam"], ("optimizer.name", "no updates")),
    (["--engine", "fused"], ("engine", "no updates")),
    (["--checkpointing_steps", "5"], ("checkpoint.checkpointing_steps", "no updates")),
    (["--resume_from_checkpoint", "latest"], ("resume_from_checkpoint", "overwrite_output_dir")),
    (["--teacher.storage", "int8"], ("teacher.storage", "no updates")),
    (["--train.scope", "attn2"], ("train.scope", "'attn2'", "'attn2_kv'")),
    (["--rece.rounds", "2"], ("rece", "method 'rece'")),
    (["--uce.tokens", "first"], ("uce.tokens", "'first'", "'all', 'tail' or 'last'")),
    (["--uce.regularisation", "0"], ("uce.regularisation", "greater than 0")),
    (["--uce.erase_scale", "-1"], ("uce.erase_scale", "greater than 0")),
    (["--retain.prompts", "a neon style cat"], ("retain.prompts", "'neon style'", "to be erased")),
    (["--retain.prompts", "a {thing}"], ("retain.prompts", "{object} and {style}")),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_what_has_no_meaning_is_refused_in_one_line(arguments: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refusal:
        load_config(None, ["--method", "uce", "--concepts", "neon style", *arguments])
    message = str(refusal.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_the_resolved_configuration_can_be_read_again() -> None:
    for method in ("uce", "rece"):
        cfg = config(method, rece={} if method == "uce" else {"rounds": 2}).resolved()
        assert cfg.train.max_train_steps is None and cfg.train.scope == "attn2_kv" and not cfg.trains
        assert Config.model_validate(cfg.model_dump()) == cfg


@pytest.mark.parametrize(("method", "ranks"), [("uce", 1), ("rece", 2)])
def test_a_run_edits_several_concepts_and_leaves_the_files(method: str, ranks: int, tmp_path: Path) -> None:
    """With two ranks, which are started as a user starts them, the first one does it."""
    out = tmp_path / "out"
    words = [
        str(ROOT / "fastunlearn" / "train.py"), "--method", method,
        "--concepts", "neon style; cat", "--output_dir", str(out), "--train.cpu_threads", "1",
        "--evaluation.mode", "off", "--evaluation.num_inference_steps", "2", "--num_validation_images", "1",
        "--progress.enabled", "false",
    ]  # fmt: skip
    if ranks == 1:
        done = forked.run(words, tmp_path, cwd=tmp_path)
    else:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", str(ranks)]
        done = subprocess.run(
            [*launcher, *words], capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False
        )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["updates"] == 0 and metrics["unet_evaluations"]["total"] == 0 and metrics["engine"] is None
    assert metrics["world_size"] == ranks and metrics["concepts"] == ["neon style", "cat"]
    before = load_file(next((pipeline_path() / "unet").glob("*.safetensors")))
    after = load_file(next((out / "unet").glob("*.safetensors")))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(load_file(out / "delta.safetensors"))
    assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in changed)
    card = (out / "README.md").read_text()
    assert "uce.regularisation 0.5" in card and "learning rate" not in card
