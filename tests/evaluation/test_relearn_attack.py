"""The attacker on a tiny U-Net with SDXL's structure: what is trained, on which loss, and that it repeats."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny import tiny_backbone, tiny_unet
from torch import Tensor

from fastunlearn.config import Config
from fastunlearn.denoisers.lora import low_rank
from fastunlearn.evaluation.attacks.fine_tuning import Options, edit, table
from fastunlearn.evaluation.attacks.learned_words import token_ids
from fastunlearn.evaluation.relearning import Settings, attack_steps, denoising_error
from fastunlearn.evaluation.relearning.pictures import Pictures
from fastunlearn.models.backbone import Backbone, build_backbone
from fastunlearn.models.loading import load_pipeline
from fastunlearn.models.pipeline import encode_prompts
from fastunlearn.prompts.variants import PromptTable
from fastunlearn.sampling.image_pool import LatentPool

PROMPTS = ["a cat", "the cat", "cat, ink style", "cat art"]
PROMPT_TABLE = PromptTable([], [], PROMPTS)
OPTIONS = Options(learning_rate=2e-3, batch_size=4)


def pool(prompts: list[str] = PROMPTS, shape: tuple[int, ...] = (4, 8, 8), scale: float = 1.0) -> LatentPool:
    draw = torch.Generator().manual_seed(3)
    return LatentPool(scale * torch.randn(len(prompts), *shape, generator=draw), prompts)


def weights(backbone: Backbone) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.unet.state_dict().items()}


def output(unet: torch.nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    latents, hidden, pooled = (torch.randn(size, generator=draw) for size in ((2, 4, 8, 8), (2, 5, 16), (2, 8)))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 2)}
    with torch.no_grad():
        return unet(latents, torch.tensor([500, 100]), encoder_hidden_states=hidden, added_cond_kwargs=added).sample


def attacked(
    backbone: Backbone, settings: Settings, steps: int, seed: int = 0
) -> tuple[list[float], dict[str, Tensor]]:
    with edit(settings, backbone, PROMPT_TABLE.index, seed) as change:
        losses = list(islice(attack_steps(backbone, pool(), change, OPTIONS, seed), steps))
        return losses, weights(backbone)


@pytest.mark.parametrize(("attack", "left"), [("full", 0.9), ("attn", 0.99)])  # of the error: attentions are a tenth
def test_an_attack_learns_and_changes_its_scope_only(attack: str, left: float) -> None:
    backbone = tiny_backbone(PROMPT_TABLE)
    before = weights(backbone)
    start = denoising_error(backbone, pool(), table(backbone, PROMPT_TABLE.index))
    with edit(Settings(attack=attack), backbone, PROMPT_TABLE.index, 0) as change:
        for _ in islice(attack_steps(backbone, pool(), change, OPTIONS, 0), 40):
            assert all(parameter.grad is None for parameter in backbone.unet.parameters())
        error = denoising_error(backbone, pool(), change.embed)
        after = weights(backbone)
    assert error < left * start
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    attentions = {name for name in before if ".attn1." in name or ".attn2." in name}
    assert changed == (set(before) if attack == "full" else attentions)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(backbone).items()), "it is undone"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_models_own(prediction: str) -> None:
    """On pictures that are all zero the noise can be read off the noisy latents: x_t = sqrt(1 - A) noise."""
    backbone = tiny_backbone(PROMPT_TABLE, prediction)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    backbone.unet.register_forward_hook(lambda _, args, out: seen.append((args[0], args[1], out[0].detach())))
    with edit(Settings(), backbone, PROMPT_TABLE.index, 0) as change:
        losses = list(islice(attack_steps(backbone, pool(scale=0.0), change, OPTIONS, 7), 3))
    for loss, (noisy, times, predicted) in zip(losses, seen, strict=True):
        level = backbone.noise.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
        noise = noisy / (1 - level).sqrt()
        target = noise if prediction == "epsilon" else level.sqrt() * noise
        assert loss == pytest.approx(((predicted - target) ** 2).mean().item(), rel=1e-4)
        assert noise.std() == pytest.approx(1.0, abs=0.15)
    assert len({int(time) for _, times, _ in seen for time in times}) > 9, "every sample has a timestep of its own"


def test_the_same_seed_gives_the_same_bits() -> None:
    first, second = (attacked(tiny_backbone(PROMPT_TABLE), Settings(attack="full"), 5, seed=1) for _ in range(2))
    other = attacked(tiny_backbone(PROMPT_TABLE), Settings(attack="full"), 5, seed=2)
    assert first[0] == second[0] != other[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_every_picture_is_seen_once_an_epoch() -> None:
    backbone = tiny_backbone(PROMPT_TABLE)
    seen: list[str] = []

    def embed(prompts: list[str]) -> object:
        seen.extend(prompts)
        return table(backbone, PROMPT_TABLE.index)(prompts)

    with edit(Settings(), backbone, PROMPT_TABLE.index, 0) as change:
        change = type(change)(change.parameters, embed)  # type: ignore[arg-type]
        list(islice(attack_steps(backbone, pool(), change, Options(1e-4, batch_size=2), 0), 4))
        assert sorted(seen[:4]) == sorted(seen[4:]) == sorted(PROMPTS)
        seen.clear()
        list(islice(attack_steps(backbone, pool(), change, Options(1e-4, caption_dropout=0.5), 0), 16))
    assert 0.3 < seen.count("") / len(seen) < 0.7


def test_low_rank_starts_at_the_original_and_merges() -> None:
    unet = tiny_unet().requires_grad_(False)
    before, start = copy.deepcopy(unet.state_dict()), output(unet)
    with low_rank(unet, 2, seed=0) as added:
        assert len(added) == 4 * 2 * len([name for name, _ in unet.named_modules() if name.endswith("attn1")])
        assert torch.equal(output(unet), start)
        for pair in added:
            torch.nn.init.normal_(pair.up, std=0.2)
        changed = output(unet)
        assert (changed - start).abs().max() > 1e-2
        assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
    assert torch.equal(output(unet), start)
    for pair in added:
        pair.merge()
    torch.testing.assert_close(output(unet), changed, atol=1e-5, rtol=1e-4)


def test_a_low_rank_attack_learns_without_touching_the_weights() -> None:
    backbone = tiny_backbone(PROMPT_TABLE)
    before = weights(backbone)
    start = denoising_error(backbone, pool(), table(backbone, PROMPT_TABLE.index))
    with edit(Settings(attack="lora"), backbone, PROMPT_TABLE.index, 0) as change:
        assert denoising_error(backbone, pool(), change.embed) == start
        list(islice(attack_steps(backbone, pool(), change, Options(1e-2, 4), 0), 40))
        assert denoising_error(backbone, pool(), change.embed) < 0.97 * start
        assert all(torch.equal(before[name], tensor) for name, tensor in weights(backbone).items())
    assert denoising_error(backbone, pool(), table(backbone, PROMPT_TABLE.index)) == start


def test_the_held_out_error_is_that_of_noise_for_a_model_that_says_nothing() -> None:
    backbone = tiny_backbone(PROMPT_TABLE, unet=lambda sample, *_, **__: (torch.zeros_like(sample),))
    many = pool([PROMPTS[i % 4] for i in range(24)])
    embed = table(backbone, PROMPT_TABLE.index)
    error = denoising_error(backbone, many, embed)
    assert error == pytest.approx(1.0, abs=0.05)  # 6144 squares of standard normal numbers
    assert denoising_error(backbone, many, embed, batch_size=5) == pytest.approx(error, rel=1e-6)


# --- textual inversion, which needs text encoders --------------------------------------------------------------------


@pytest.fixture(scope="module")
def canvas() -> Iterator[tuple[Backbone, object]]:
    pipeline = load_pipeline("minicanvas")
    backbone = build_backbone(pipeline, PROMPT_TABLE.texts, None, torch.device("cpu"), torch.float32)
    backbone.unet.eval().requires_grad_(False)
    yield backbone, pipeline


def test_textual_inversion_learns_the_word_and_nothing_else(canvas: tuple) -> None:
    backbone, pipeline = canvas
    before = weights(backbone)
    encoders = copy.deepcopy([pipeline.text_encoder.state_dict(), pipeline.text_encoder_2.state_dict()])
    pictures = pool(shape=(4, 16, 16))
    own = encode_prompts(pipeline, ["a cat", "a fish"])
    with edit(Settings(attack="textual-inversion"), backbone, PROMPT_TABLE.index, 0, pipeline, ["cat"]) as change:
        start = [vector.detach().clone() for vector in change.parameters]
        assert [tuple(vector.shape) for vector in start] == [(1, 32), (1, 64)]
        assert torch.equal(
            change.embed(["a cat", ""]).hidden, table(backbone, PROMPT_TABLE.index)(["a cat", ""]).hidden
        )
        list(islice(attack_steps(backbone, pictures, change, Options(1e-1, 4), 0), 2))
        assert all(not torch.equal(old, new) for old, new in zip(start, change.parameters, strict=True))
        # Whatever the pipeline encodes now uses the new vectors, and only where the word stands.
        changed = encode_prompts(pipeline, ["a cat", "a fish"])
        assert (changed.hidden[0] - own.hidden[0]).abs().max() > 1e-3
        assert torch.equal(changed.hidden[1], own.hidden[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(backbone).items())
    for old, encoder in zip(encoders, (pipeline.text_encoder, pipeline.text_encoder_2), strict=True):
        assert all(torch.equal(old[name], tensor) for name, tensor in encoder.state_dict().items())
    assert torch.equal(encode_prompts(pipeline, ["a cat"]).hidden[0], own.hidden[0])


def test_the_words_tokens_are_found(canvas: tuple) -> None:
    tokenizer = canvas[1].tokenizer
    (token,) = token_ids(tokenizer, ["cat"])
    assert tokenizer("a picture of a cat, ink style").input_ids.count(token) == 1
    assert len(token_ids(tokenizer, ["cat", "neon", "cat"])) == 2


# --- the pictures ----------------------------------------------------------------------------------------------------


def test_pictures_are_drawn_once_per_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cfg = Config.model_validate({"concepts": ["cat"], "retain": {"num_inference_steps": 2}})
    calls: list[int] = []
    backbone = tiny_backbone(PROMPT_TABLE)
    backbone.unet.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    pictures = Pictures(cfg, backbone, PROMPT_TABLE)
    assert pictures.evaluations(PROMPTS, 6, 1) == 2 * 2 * 6
    drawn = pictures.drawn(PROMPTS, 6, 1)
    assert sum(calls) == 2 * 2 * 6 and drawn.latents.shape == (6, 4, 8, 8)
    assert set(drawn.prompts) == set(PROMPTS)
    calls.clear()
    again = Pictures(cfg, backbone, PROMPT_TABLE).drawn(PROMPTS, 6, 1)
    assert not calls and torch.equal(again.latents, drawn.latents) and again.prompts == drawn.prompts
    assert pictures.evaluations(PROMPTS, 6, 1) == 0
    assert not torch.equal(pictures.drawn(PROMPTS, 6, 2).latents, drawn.latents)
    assert calls
    other = Pictures(cfg, tiny_backbone(PROMPT_TABLE, unet=tiny_unet(seed=1)), PROMPT_TABLE)
    assert other.file(PROMPTS, 6, 1) != pictures.file(PROMPTS, 6, 1)
    pictures.file(PROMPTS, 6, 1).write_bytes(b"torn")
    assert torch.equal(pictures.drawn(PROMPTS, 6, 1).latents, drawn.latents)
