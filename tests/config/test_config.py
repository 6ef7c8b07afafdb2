"""The configuration: what it accepts, what it refuses and in which words, and what follows from it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from fastunlearn.config import Config, load_config, resolved_keep, resolved_scope, resolved_steps
from fastunlearn.config.concept_rules import said_back
from fastunlearn.config.options import ALIASES, fields_of
from fastunlearn.engines.zero.deepspeed_config import deepspeed_config
from fastunlearn.errors import UserError
from fastunlearn.gradients.transforms import build_transforms
from fastunlearn.methods.kscu import first_key_step
from fastunlearn.prompts.vocabulary import GENERIC, MINICANVAS
from fastunlearn.schema.attention_rules import UNFUSED
from fastunlearn.schema.fields import AttentionBackend, GradientDtype, WeightDtype
from fastunlearn.utils.distributed import single_process
from fastunlearn.utils.dtypes import DTYPES

SDXL = ["--pretrained_model_name_or_path", "org/sdxl"]  # free-form concept names; nothing is loaded here

# command line -> dotted field, value
OVERRIDES: list[tuple[list[str], str, Any]] = [
    (["--train.max_train_steps", "7"], "train.max_train_steps", 7),
    (["--train.max_train_steps=7"], "train.max_train_steps", 7),
    (["--train.max-train-steps=7"], "train.max_train_steps", 7),
    (["--max_train_steps", "9", "--train.max_train_steps", "7"], "train.max_train_steps", 7),
    (["--max_train_steps", "none"], "train.max_train_steps", None),
    (["--learning_rate", "3e-4"], "train.learning_rate", 3e-4),
    (["--learning_rate", "1"], "train.learning_rate", 1.0),
    (["--zero.reduce_bucket_size", "2e8"], "zero.reduce_bucket_size", 200_000_000),
    (["--gradient_checkpointing"], "model.gradient_checkpointing", True),
    (["--gradient_checkpointing", "--seed", "3"], "model.gradient_checkpointing", True),
    (["--gradient_checkpointing", "false"], "model.gradient_checkpointing", False),
    (["--model.gradient_checkpointing=True"], "model.gradient_checkpointing", True),
    (["--use_8bit_adam"], "optimizer.name", "adamw8bit"),
    (["--enable_xformers_memory_efficient_attention"], "model.attention", "xformers"),
    (["--zero_stage", "3"], "zero.stage", 3),
    (["--method", "esd"], "method", "esd"),
    (["--keep", "ink style; tree"], "keep", ["ink style", "tree"]),
    (["--keep", ""], "keep", []),
    (["--evaluation.seeds", "1; 2;3", "--evaluation.target_seeds", "3"], "evaluation.seeds", [1, 2, 3]),
    (["--evaluation.seeds", "[4, 5]", "--evaluation.target_seeds", "2"], "evaluation.seeds", [4, 5]),
    (["--validation_prompt", "a cat; a dog"], "report.validation_prompts", ["a cat; a dog"]),
    (["--kscu.uncond_gradient", "true"], "kscu.uncond_gradient", True),
    (["--kscu.uncond_gradient", "auto"], "kscu.uncond_gradient", "auto"),
    (["--resume_from_checkpoint", "5"], "resume_from_checkpoint", "5"),
    ([*SDXL, "--keep", "1984"], "keep", ["1984"]),
    (["--prompts.templates", "{concept}", "--prompts.anchor_templates", "-"], "prompts.anchor_templates", ["-"]),
    (["--output-dir", "-out"], "output_dir", "-out"),
    (["--output_dir", "a=b"], "output_dir", "a=b"),
    (["--use_8bit_adam", "--optimizer.name", "adamw"], "optimizer.name", "adamw"),
    (["--optimizer.name", "adamw", "--use-8bit-adam=yes"], "optimizer.name", "adamw8bit"),
    (["--resume_from_checkpoint", "latest"], "resume_from_checkpoint", "latest"),
    (["--guidance_scale", "2"], "sampler.guidance_scale", 2.0),
    (["--local_rank=1", "--seed", "5"], "seed", 5),
]

# command line -> words that the one line must hold
REFUSED: list[tuple[list[str], tuple[str, ...]]] = [
    (["--concepts", ""], ("concepts", "none given")),
    (["--concepts", '[""]'], ("concepts", "empty concept")),
    (["--concepts", "cat; cat"], ("concepts", "'cat'", "repeats")),
    (["--concepts", "neon; Neon style"], ("concepts", "'Neon style'", "repeats 'neon'")),
    (["--concepts", "cat; kitty"], ("concepts", "'kitty'", "repeats 'cat'")),
    (["--concepts", "cat", "--keep", "tree; CAT"], ("keep", "'CAT'", "also to be erased")),
    (["--concepts", "neon style", "--keep", "neon"], ("keep", "'neon'", "also to be erased")),
    (["--concepts", "neon style", "--keep", "[' ']"], ("keep", "empty")),
    (["--concepts", '[{name="cat", anchor="Cat"}]'], ("anchor", "'Cat'", "itself")),
    (["--concepts", '[{name="cat", kind="thing"}]'], ("concepts[0].kind", "'thing'", "'object'")),
    (["--concepts", '[{nam="cat"}]'], ("concepts[0].nam", "unknown field", "nearest: name")),
    (["--concepts", '[{anchor="cat"}]'], ("concepts[0].name", "missing")),
    (["--concepts", '["cat"'], ("concepts", "a list is needed")),
    (["--concepts", "nein style"], ("concepts", "'nein style'", "nearest: neon style")),
    (["--keep", "fich"], ("keep", "'fich'", "nearest: fish")),
    (
        ["--concepts", '["neon style", {name="cat", kind="nudity"}]'],
        ("train.scope", "'cat' noxattn", "'neon style' attn2"),
    ),
    (["--method", "ecd"], ("method", "'ecd'", "'kscu', 'esd', 'doco'", "nearest: esd")),
    (["--train.scope", "atn2"], ("train.scope", "'atn2'", "nearest: attn2")),
    (["--learning_rate", "-1e-5"], ("train.learning_rate", "-1e-05", "greater than 0")),
    (["--learning_rate", "fast"], ("train.learning_rate", "'fast'", "a number")),
    (["--learning_rate", "nan"], ("train.learning_rate", "finite")),
    (["--max_train_steps", "0"], ("train.max_train_steps", "0", "at least 1")),
    (["--max_train_steps", "1.5"], ("train.max_train_steps", "1.5", "whole number")),
    (["--resolution", "100"], ("train.resolution", "100", "multiple of 8")),
    (["--gradient_checkpointing=maybe"], ("model.gradient_checkpointing", "'maybe'", "true or false")),
    (["--use_8bit_adam=maybe"], ("--use_8bit_adam", "'maybe'", "true or false")),
    (["--mixed_precision", "fp16"], ("model.mixed_precision", "'fp16'", "'no' or 'bf16'")),
    (["--zero_stage", "4"], ("zero.stage", "4", "0, 1, 2 or 3")),
    (["--kscu.uncond_gradient", "maybe"], ("kscu.uncond_gradient", "'auto', true or false")),
    (["--kscu.start", "45"], ("kscu.start", "45", "less than 45")),
    (["--kscu.start", "-1"], ("kscu.start", "-1", "at least 0")),
    (["--prompts.templates", "a picture"], ("prompts.templates", "'a picture'", "lacks {concept}")),
    (["--prompts.anchor_templates", "a"], ("prompts.anchor_templates", "no prompts.templates")),
    (["--prompts.templates", "{concept"], ("prompts.templates", "unbalanced braces")),
    (["--prompts.templates", "{}"], ("prompts.templates", "'{}'", "allowed here")),
    (["--prompts.templates", "{concept} in {contexts}"], ("prompts.templates", "{contexts}", "nearest: context")),
    (["--prompts.templates", "{concept} in {context}"], ("prompts.contexts", "empty")),
    (["--prompts.contexts", "tree; neon"], ("prompts.contexts", "'neon'", "also to be erased")),
    (
        ["--prompts.templates", "{concept}", "--prompts.anchor_templates", "a; b"],
        ("prompts.anchor_templates", "2 entries", "1;"),
    ),
    (
        ["--prompts.templates", "{concept}", "--prompts.anchor_templates", "in {context}"],
        ("prompts.anchor_templates", "{context}", "no placeholder"),
    ),
    (["--zero.offload_optimizer", "cpu", "--zero_stage", "0"], ("zero.offload_optimizer", "zero.stage")),
    (["--zero.offload_optimizer", "cpu", "--use_8bit_adam"], ("zero.offload_optimizer", "'adamw'")),
    (["--zero.offload_optimizer", "cpu", "--optimizer.name", "paged_adamw8bit"], ("zero.offload_optimizer", "paged")),
    (["--output_dir", " "], ("output_dir", "empty")),
    (["--overwrite_output_dir", "--resume_from_checkpoint", "latest"], ("overwrite_output_dir", "contradicts")),
    (["--evaluation.seeds", "[]"], ("evaluation.seeds", "at least 1")),
    (["--evaluation.seeds", "1;1"], ("evaluation.seeds", "repeats")),
    (["--evaluation.target_seeds", "9"], ("evaluation.target_seeds", "9", "8 entries")),
    (["--train.max_steps", "3"], ("--train.max_steps", "unknown option", "--train.max_train_steps")),
    (["--esd.start", "3"], ("--esd.start", "unknown option", "nearest: --kscu.start")),
    (["--learning_rte", "3"], ("--learning_rte", "unknown option", "--learning_rate")),
    (["--xqxqxqxq.sorc", "3"], ("--xqxqxqxq.sorc", "unknown option", "nearest: --retain.source")),
    (
        ["--concepts", "violence, nudity, harm"],
        ("concepts: 'violence, nudity, harm'", "one name", "violence; nudity; "),
    ),
    (["--keep", "dog\nhorse"], ("keep: 'dog", "is one name", '"dog; horse"')),
    (["--keep", "dog，horse"], ("is one name", '"dog; horse"')),
    (["--keep", "dog,horse"], ("keep: 'dog,horse' is one name", '"dog; horse"', "in a file")),
    (["--seed"], ("--seed", "value is missing")),
    (["--seed", "--method", "esd"], ("--seed", "value is missing")),
    (["stray"], ("'stray'", "unexpected argument")),
]

# TOML text -> words that the one line must hold
ONE_TEMPLATE = ("--prompts.templates", "{concept}")
REFUSED_TOML = [
    ('concepts = ["cat"]\n[train]\nmax_steps = 3\n', ("train.max_steps", "unknown field", "train.max_train_steps")),
    ('concepts = ["cat"]\n[trian]\n', ("trian", "unknown field", "nearest: train")),
    ('concepts = ["cat"]\n[zero]\nlearning_rate = 1\n', ("zero.learning_rate", "nearest: train.learning_rate")),
    ('concepts = "cat"\n', ("concepts", "'cat'", "a list is needed")),
    ('concepts = ["cat"]\ntrain = 3\n', ("train", "3", "a section")),
    ('concepts = ["cat"]\n[train]\nmax_train_steps = "500"\n', ("train.max_train_steps", "'500'", "whole number")),
    ('concepts = ["cat"]\nseed = true\n', ("seed", "True", "whole number")),
    ("concepts = [\n", ("not valid TOML", "run.toml")),
    ('concepts = ["cat, dog"]\n', ("concepts: 'cat, dog' is one name", "['cat', 'dog'] in a file")),
    ('concepts = ["cat; dog"]\n', ("concepts: 'cat; dog' is one name", "for 2 write")),
]

# method, concepts, other arguments -> scope, updates, start of the first concept
DEFAULTS = [
    ("kscu", "neon style", [], "attn2", 500, 24),
    ("kscu", "cat", [], "attn2", 750, 14),
    ("kscu", "nudity", SDXL, "noxattn", 750, 14),
    ("kscu", '[{name="my dog", kind="instance"}]', SDXL, "attn2", 200, 40),
    ("kscu", '[{name="my dog", kind="instance"}, {name="a cup", kind="instance"}]', SDXL, "attn2", 750, 40),
    ("kscu", '[{name="my dog", kind="instance"}, "Monet style"]', SDXL, "attn2", 750, 40),
    ("kscu", "cat; neon style", ["--train.scope", "attn2"], "attn2", 750, 14),
    ("kscu", "neon style", ["--num_inference_steps", "25"], "attn2", 500, 12),
    ("kscu", "neon style", ["--kscu.start", "44", "--num_inference_steps", "10"], "attn2", 500, 8),
    ("esd", "neon style", [], "attn2", 1000, 24),
    ("esd", "cat; neon style", ["--esd.variant", "x-strict"], "attn2_kv", 1000, 14),
    ("esd", "cat", ["--esd.variant", "u", "--max_train_steps", "3"], "noxattn", 3, 14),
    ("esd", "cat", ["--esd.variant", "full"], "full", 1000, 14),
]

KINDS = [
    ("Van Gogh style", "style"),
    ("  monet  STYLE ", "style"),
    ("NSFW", "nudity"),
    ("nudity", "nudity"),
    ("dog", "object"),
    ("neon", "object"),
]


def load(*arguments: str, concepts: str = "neon style") -> Config:
    return load_config(None, with_concepts(arguments, concepts))


def with_concepts(arguments: Sequence[str], concepts: str = "neon style") -> list[str]:
    """Those of the arguments, or else these."""
    return [*arguments] if "--concepts" in arguments else ["--concepts", concepts, *arguments]


def refusal(arguments: list[str], path: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("arguments", "field", "value"), OVERRIDES)
def test_override_sets_the_field(arguments: list[str], field: str, value: Any) -> None:
    found: Any = load(*arguments)
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_refusal_names_field_value_and_remedy(arguments: list[str], words: tuple[str, ...]) -> None:
    message = refusal(with_concepts(arguments))
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize(("text", "words"), REFUSED_TOML)
def test_refusal_of_a_toml_file(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    message = refusal([], str(file))
    assert not [word for word in words if word not in message], message


XL = ("--pretrained_model_name_or_path", "org/model", "--train.scope", "attn2")


def test_lists_that_are_given_more_than_once_add_up() -> None:
    cfg = load_config(
        None, ["--concepts", "violence", "--concepts=harm; blood", *XL, "--keep", "dog", "--keep", "fish"]
    )
    assert [concept.name for concept in cfg.concepts] == ["violence", "harm", "blood"] and cfg.keep == ["dog", "fish"]
    assert said_back(cfg) == (
        "3 concepts: violence (object); harm (object); blood (object)\n"
        "held by the retain gradient: dog; fish (--surgery.enabled false leaves it out)"
    )
    prompts = ["--validation_prompt", "a cat, sleeping", "--validation_prompt", "one; two", "--retain.prompts", "a; b"]
    cfg = load_config(None, ["--concepts", "harm", *XL, *prompts, "--retain.prompts", "c"])
    assert cfg.report.validation_prompts == ["a cat, sleeping", "one; two"] and cfg.retain.prompts == ["a", "b", "c"]
    assert load_config(None, ["--concepts", "harm", *XL, "--seed", "1", "--seed", "2"]).seed == 2
    with pytest.raises(UserError, match="concepts"):
        load_config(None, ["--concepts", "harm", "--concepts", "[broken", *XL])


def test_one_name_with_a_comma_is_written_in_quotes(tmp_path: Path) -> None:
    cfg = load_config(None, ["--concepts", '"violence, nudity"', *XL, "--keep", '"a, b"', "--keep", "c"])
    assert [concept.name for concept in cfg.concepts] == ["violence, nudity"] and cfg.keep == ["a, b", "c"]
    assert said_back(cfg).splitlines()[0] == "1 concept: violence, nudity (object)"
    (tmp_path / "run.toml").write_text(cfg.to_toml())
    assert load_config(str(tmp_path / "run.toml"), []) == cfg
    table = load_config(None, ["--concepts", '[{name = "violence, nudity", anchor = "a"}]', *XL])
    assert said_back(table) == "1 concept: violence, nudity (object, anchor: a)"


def test_what_a_bare_proper_name_was_taken_for_is_said_with_what_to_write_instead() -> None:
    said = said_back(load_config(None, ["--concepts", "Van Gogh; cat; Monet style", *XL]))
    assert said.startswith("3 concepts: Van Gogh (object); cat (object); Monet style (style)\n'Van Gogh' is taken as")
    assert (
        "'Van Gogh style'" in said and '{name = "Van Gogh", kind = "instance"}' in said and said.count("taken as") == 1
    )
    given = load_config(None, ["--concepts", '[{name = "Snoopy", kind = "instance"}]', *XL])
    assert said_back(given) == "1 concept: Snoopy (instance)"


def test_a_missing_config_names_its_nearest_sibling(tmp_path: Path) -> None:
    (tmp_path / "style.toml").write_text("")
    assert "nearest: style.toml" in refusal([], str(tmp_path / "styl.toml"))
    assert "cannot be read" in refusal([], str(tmp_path))


@pytest.mark.parametrize(("model", "kept"), [("org/one", True), ("org/other", False), ("mine.safetensors", False)])
def test_variant_and_revision_of_a_file_go_with_its_own_model(model: str, kept: bool, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    text = 'pretrained_model_name_or_path = "org/one"\nvariant = "fp16"\nrevision = "abc"\n'
    file.write_text(f'concepts = ["a horse"]\n[model]\n{text}')
    arguments = ["--pretrained_model_name_or_path", model]
    found = load_config(str(file), arguments).model
    assert (found.variant, found.revision) == (("fp16", "abc") if kept else (None, None))
    assert load_config(str(file), [*arguments, "--variant", "ema"]).model.variant == "ema"


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('concepts = ["cat"]\nseed = 1\n[train]\nlearning_rate = 1e-4\nmax_train_steps = 9\n')
    cfg = load_config(str(file), ["--seed", "2", "--train.max_train_steps", "none"])
    assert (cfg.seed, cfg.train.learning_rate, cfg.train.max_train_steps) == (2, 1e-4, None)


ROUND_TRIPS = [
    (),
    ("--concepts", '[{name="cat", anchor="tree"}, "fish"]', "--keep", "neon style; tree"),
    ("--train.max_train_steps", "5", "--learning_rate", "1.2345678901234567e-5", "--kscu.uncond_gradient", "false"),
    ("--output_dir", 'a "quoted" \\ folder\té\x7f\U0001f408', "--resume_from_checkpoint", "latest"),
    (*SDXL, "--concepts", "it's; x = [1]; # no comment", "--evaluation.seeds", "7", "--evaluation.target_seeds", "1",
     "--evaluation.retain_seeds", "1"),
]  # fmt: skip


@pytest.mark.parametrize("arguments", ROUND_TRIPS)
def test_toml_round_trip(arguments: tuple[str, ...], tmp_path: Path) -> None:
    cfg = load(*arguments)
    for written in (cfg, cfg.resolved()):
        file = tmp_path / "config.toml"
        file.write_text(written.to_toml(), encoding="utf-8")
        assert load_config(str(file), []) == written


@pytest.mark.parametrize(("method", "concepts", "arguments", "scope", "steps", "start"), DEFAULTS)
def test_defaults_follow_method_and_kind(
    method: str, concepts: str, arguments: list[str], scope: str, steps: int, start: int
) -> None:
    published = ("--kscu.start", "published", "--sampler.num_inference_steps", "50")
    cfg = load("--method", method, *published, *arguments, concepts=concepts)
    assert resolved_scope(cfg) == scope
    assert resolved_steps(cfg) == steps
    assert first_key_step(cfg, cfg.kind_of(cfg.concepts[0])) == start
    resolved = cfg.resolved()
    assert (resolved.train.scope, resolved.train.max_train_steps) == (scope, steps)
    assert all(concept.kind != "auto" for concept in resolved.concepts)


@pytest.mark.parametrize(
    ("method", "keep"),
    [
        *itertools.product(["kscu", "esd", "sdd"], [(), ("--keep", "fish")]),
        *itertools.product(["kscu", "esd"], [("--teacher.storage", "cached")]),
    ],
)
def test_a_resolved_run_protects_no_more_than_the_run_did(method: str, keep: tuple[str, ...], tmp_path: Path) -> None:
    """MiniCanvas' names are filled in there: a run from that config.toml has to be the same run."""
    cfg = load("--method", method, *keep, concepts="cat")
    (tmp_path / "run.toml").write_text(cfg.resolved().to_toml(), encoding="utf-8")
    again = load_config(str(tmp_path / "run.toml"), [])
    for run in (cfg, cfg.resolved(), again):
        held = "cached" not in keep
        assert (run.retains, run.rho) == ((True, 5.0) if held else (False, 0.0))
        assert not held or (run.retain_source, run.retain_batch_size) == ("prompts", 1)


@pytest.mark.parametrize("steps", range(2, 61))
def test_every_start_lies_within_the_schedule(steps: int) -> None:
    for start in range(45):
        cfg = load("--kscu.start", str(start), "--num_inference_steps", str(steps))
        assert 0 <= first_key_step(cfg, "style") < 0.9 * steps


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_kind_from_the_name(name: str, kind: str) -> None:
    assert GENERIC.kind_of(name) == kind


def test_minicanvas_knows_its_names() -> None:
    assert MINICANVAS.kind_of("neon") == "style"
    kept = resolved_keep(load(concepts="kitty"))
    assert "cat" not in kept and {"neon style", "tree"} <= set(kept) and len(kept) == 17
    assert resolved_keep(load("--keep", "tree")) == ["tree"]
    assert resolved_keep(load(*SDXL)) == []


# ranks, cores, GPU, arguments -> words, or None where it is allowed
MACHINES: list[tuple[int, int, bool, list[str], tuple[str, ...] | None]] = [
    (1, 1, False, [], None),
    (2, 2, False, [], None),
    (8, 2, True, [], None),
    (3, 2, False, [], ("3 ranks", "2 CPU cores", "1 to 2")),
    (0, 2, False, [], ("0 ranks",)),
    (2, 2, False, ["--train.cpu_threads", "2"], ("train.cpu_threads", "2 CPU cores")),
    (1, 2, False, ["--model.attention", "xformers"], ("model.attention", "GPU")),
]


@pytest.mark.parametrize(("ranks", "cores", "gpu", "arguments", "words"), MACHINES)
def test_runtime_refusals(
    ranks: int, cores: int, gpu: bool, arguments: list[str], words: tuple[str, ...] | None
) -> None:
    cfg = load(*arguments)
    if words is None:
        cfg.validate_runtime(ranks, cpu_count=cores, has_gpu=gpu)
        return
    with pytest.raises(UserError) as caught:
        cfg.validate_runtime(ranks, cpu_count=cores, has_gpu=gpu)
    assert not [word for word in words if word not in str(caught.value)], caught.value


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_config(stage: int, precision: str) -> None:
    cfg = load("--zero_stage", str(stage), "--mixed_precision", precision, "--train_batch_size", "3",
               "--gradient_accumulation_steps", "2", "--max_grad_norm", "0.5")  # fmt: skip
    found = deepspeed_config(cfg, world_size=4)
    assert found["train_batch_size"] == 24
    assert found["train_micro_batch_size_per_gpu"] == 3
    assert found["gradient_accumulation_steps"] == 2
    # Clipping has one owner, which is not DeepSpeed.
    assert found["gradient_clipping"] == 0.0
    assert build_transforms(cfg, ["weight"], single_process()).clip.limit == 0.5
    assert found["zero_optimization"]["stage"] == stage
    assert found["zero_allow_untested_optimizer"] and not found["zero_force_ds_cpu_optimizer"]
    assert found.get("bf16", {}).get("enabled", False) == (precision == "bf16" and stage > 0)
    # fp32 accumulation with bf16 at stage 1 makes DeepSpeed switch to another optimizer class, silently.
    assert found.get("data_types", {}).get("grad_accum_dtype") != "fp32"
    assert found == deepspeed_config(cfg, world_size=4)


def test_offload_is_passed_on() -> None:
    zero = deepspeed_config(load("--zero.offload_optimizer", "cpu"), 1)["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert "offload_optimizer" not in deepspeed_config(load(), 1)["zero_optimization"]


def test_every_field_is_described_and_every_alias_leads_to_a_field() -> None:
    fields = dict(fields_of(Config))
    assert not [name for name, info in fields.items() if not info.description]
    assert not [name for name in ALIASES.values() if name not in fields]


def test_a_config_cannot_be_changed_unchecked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().train.learning_rate = -1.0


def test_dtypes_are_those_of_the_vocabularies() -> None:
    assert set(DTYPES) == set(get_args(WeightDtype)) and set(get_args(GradientDtype)) - {"int8"} <= set(DTYPES)
    assert set(UNFUSED) < set(get_args(AttentionBackend))
