"""The pictures of a probe: what an unchanged model, a fully erased one and several ranks see, and what it costs."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from tiny import tiny_backbone
from torch import Tensor

from fastunlearn.config import Config, load_config
from fastunlearn.config.base import named_concepts
from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.models.backbone import Backbone
from fastunlearn.planning.unet_calls import count_evaluations
from fastunlearn.progress.probe import Predict, Probe
from fastunlearn.progress.prompts import probe_texts
from fastunlearn.progress.reading import Reading
from fastunlearn.progress.watch import as_it_is
from fastunlearn.prompts.variants import PromptTable, build_prompt_table
from fastunlearn.utils.distributed import World

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def config(*options: str, concepts: str = "neon style") -> Config:
    given = ["--concepts", concepts, "--train.scope", "attn2", "--progress.pairs", "5", "--progress.batch_size", "2",
             "--progress.guidance_scale", "300"]  # fmt: skip
    return load_config(None, [*given, *options])


def parts(cfg: Config, prediction_type: str = "epsilon") -> tuple[Backbone, PromptTable]:
    table = build_prompt_table(named_concepts(cfg), cfg.prompts, cfg.seed, others=probe_texts(cfg))
    return tiny_backbone(table, prediction_type), table


def rows_of(embeds: PromptEmbeds) -> list[int]:
    assert embeds.rows is not None
    return [int(row) for row in embeds.rows]


def swapped(backbone: Backbone, table: PromptTable, cfg: Config) -> Predict:
    """A model in which every probe's prompt has become its anchor."""
    probe = Probe(cfg, backbone, table, ALONE)
    anchors = {table.index[pair.prompt]: table.index[pair.anchor] for pair in probe.pairs}
    predict = as_it_is(backbone)

    def erased(latents: Tensor, timesteps: Tensor, cond: PromptEmbeds, uncond: PromptEmbeds) -> tuple[Tensor, ...]:
        rows = [anchors.get(row, row) for row in rows_of(cond)]
        return predict(latents, timesteps, backbone.embeds.select(rows), uncond)

    return erased


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_an_unchanged_model_has_not_moved_and_an_erased_one_all_the_way(prediction_type: str) -> None:
    cfg = config(concepts="neon style; cat")
    backbone, table = parts(cfg, prediction_type)
    probe = Probe(cfg, backbone, table, ALONE)
    probe.originals(as_it_is(backbone))
    before = probe.look(2, as_it_is(backbone))
    assert before.moved == ((0.0,) * 4, (0.0,) * 4) and math.isnan(before.drift), "a glance is enough"
    after = probe.look(4, swapped(backbone, table, cfg))
    assert [list(moved) for moved in after.moved] == [pytest.approx([1.0] * 5, abs=1e-5)] * 2
    assert after.share(0) == 1.0 and after.drift == 0.0


def test_drift_is_measured_in_distances_between_pictures() -> None:
    cfg = config("--progress.max_drift", "9")
    backbone, table = parts(cfg)
    probe = Probe(cfg, backbone, table, ALONE)
    probe.originals(as_it_is(backbone))
    kept = {table.index[picture.prompt] for picture in probe.kept}
    predict = as_it_is(backbone)

    def other(latents: Tensor, timesteps: Tensor, cond: PromptEmbeds, uncond: PromptEmbeds) -> tuple[Tensor, ...]:
        with_prompt, without = predict(latents, timesteps, cond, uncond)
        return (with_prompt + 10.0 if set(rows_of(cond)) <= kept else with_prompt), without

    found = probe.look(2, other)
    assert found.moved[0] == (0.0,) * 5 and found.drift > 1.0


def test_what_it_costs_is_what_is_planned() -> None:
    cfg = config("--train.max_train_steps", "10", "--surgery.enabled", "false")
    backbone, table = parts(cfg)
    seen, erased = 0, swapped(backbone, table, cfg)

    def counted(latents: Tensor, timesteps: Tensor, *conditions: PromptEmbeds) -> tuple[Tensor, ...]:
        nonlocal seen
        seen += len(latents) * len(conditions)
        return model(latents, timesteps, *conditions)

    model = as_it_is(backbone)
    probe = Probe(cfg, backbone, table, ALONE)
    probe.originals(counted)
    model = erased
    for update in (2, 4, 8, 10):
        probe.look(update, counted)
    assert seen == probe.evaluations == count_evaluations(cfg, 1).probe == (4 + 4 * 2) * 7 * 6
    model, before = as_it_is(backbone), seen
    probe.look(12, counted)
    assert seen - before == 4 * 2 * 6, "of a concept that is as ever a glance is enough"


def test_a_default_probe_is_cheap() -> None:
    cfg = load_config(None, ["--concepts", "cat"])
    backbone, table = parts(cfg)
    probe = Probe(cfg, backbone, table, ALONE)
    probe.originals(as_it_is(backbone))
    before = probe.evaluations
    probe.look(2, swapped(backbone, table, cfg))
    assert probe.evaluations - before <= 150
    before = probe.evaluations
    probe.look(2, as_it_is(backbone))
    assert probe.evaluations - before <= 50


def test_a_concept_that_the_model_does_not_draw_says_so() -> None:
    cfg = config()
    backbone, table = parts(cfg)
    probe = Probe(cfg, backbone, table, ALONE)
    probe.originals(swapped(backbone, table, cfg))
    assert not probe.shows(0)
    assert probe.look(2, as_it_is(backbone)).moved == ((),)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_every_rank_sees_what_one_alone_sees_bit_for_bit(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks in threads, whose sums meet here; three do not divide the batches, and eight are more than there are."""
    cfg = config(concepts="neon style; cat")
    backbone, table = parts(cfg)
    alone = look(cfg, backbone, table, ALONE)
    meeting, tables = threading.Barrier(world_size), [torch.empty(0)] * world_size
    mine = threading.local()

    def sum_over_ranks(value: Tensor) -> Tensor:
        tables[mine.rank] = value
        meeting.wait()
        total = torch.stack(tables).sum(0)
        meeting.wait()
        return total

    monkeypatch.setattr("fastunlearn.progress.probe.sum_over_ranks", sum_over_ranks)
    found: list[Any] = [None] * world_size

    def rank(number: int) -> None:
        mine.rank = number
        found[number] = look(cfg, backbone, table, World(number, world_size, CPU))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [reading for reading, _ in found] == [alone[0]] * world_size
    assert len({calls for _, calls in found}) == 1, "ranks of a sharded model have to call it equally often"


def look(cfg: Config, backbone: Backbone, table: PromptTable, world: World) -> tuple[Reading, int]:
    probe, calls = Probe(cfg, backbone, table, world), 0
    probe.originals(as_it_is(backbone))

    erased = swapped(backbone, table, cfg)

    def changed(latents: Tensor, timesteps: Tensor, *conditions: PromptEmbeds) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        return tuple(each * 0.99 for each in erased(latents, timesteps, *conditions))

    return probe.look(2, changed), calls
