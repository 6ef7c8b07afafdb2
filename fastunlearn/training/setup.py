"""How a run is put together: model, engine, teacher, samplers, retain samples, meta term.

The order in which the parts come to be, and in which what is no longer needed goes. The algorithm is ``trainer.py``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor

from fastunlearn.acceleration.attention import check_attention, install_attention, stop_first_token_gradient
from fastunlearn.acceleration.compilation import apply_channels_last, compile_blocks
from fastunlearn.acceleration.cuda_graphs import GraphedSampler
from fastunlearn.acceleration.text_kv_cache import PromptKeys
from fastunlearn.config import Config, resolved_scope
from fastunlearn.config.base import first_student_update, named_concepts
from fastunlearn.config.run_prompts import meta_texts, retain_prompts
from fastunlearn.denoisers.ema import Ema
from fastunlearn.denoisers.predictors import Evaluations, Predictors
from fastunlearn.denoisers.teacher import Teacher
from fastunlearn.denoisers.teacher_check import check_teacher, target_errors
from fastunlearn.engines.base import Engine, ExportedWeights
from fastunlearn.meta.image_sets import MetaSets, draw_sets, encode_sets
from fastunlearn.meta.objective import MetaObjective
from fastunlearn.methods.base import Method
from fastunlearn.methods.parts.concept_edit import put_in_place
from fastunlearn.methods.tables import build_method, rank_table
from fastunlearn.models.backbone import Backbone, build_backbone
from fastunlearn.models.loading import load_pipeline, stored_dtype
from fastunlearn.models.parameter_names import KEYS_AND_VALUES, set_trainable, trainable_names, trained_tensors
from fastunlearn.models.public_name import public_hash, public_name
from fastunlearn.models.text.neighbours import with_neighbours
from fastunlearn.progress.probe import Probe
from fastunlearn.progress.prompts import probe_texts
from fastunlearn.progress.reading import Reading
from fastunlearn.progress.seen import Eyes, open_eyes
from fastunlearn.progress.stopping import Progress
from fastunlearn.progress.watch import Watch, as_it_is
from fastunlearn.prompts.variants import PromptTable, build_prompt_table
from fastunlearn.sampling.base import BatchSampler
from fastunlearn.sampling.batch import BatchLayout
from fastunlearn.sampling.cached_sampler import sample_targets
from fastunlearn.sampling.factory import build_sampler
from fastunlearn.sampling.image_pool import encode_folder, generate_pool
from fastunlearn.sampling.key_steps import KeyStep, KeySteps
from fastunlearn.sampling.retain import RetainSource, anchor_prompts, build_source
from fastunlearn.training.checkpoint import Position, Stateful, load_checkpoint
from fastunlearn.utils.distributed import World
from fastunlearn.utils.dtypes import DTYPES
from fastunlearn_kernels.common.backend import describe


@dataclass
class Run:
    """The parts of a run, ready for its first update."""

    cfg: Config
    world: World
    method: Method
    table: list[KeyStep]
    """All updates that there can be."""
    models: Predictors
    rollout: BatchSampler
    engine: Engine
    retain: RetainSource | None = None
    meta: MetaObjective | None = None
    ema: Ema | None = None
    watch: Watch | None = None
    asked: Config | None = None
    """The configuration as it was given, for checkpoints: what follows from the model is found again from it."""
    edited: Mapping[str, Tensor] = field(default_factory=dict)
    """What a closed-form method changed before the first update, in fp32 on the host."""
    position: Position = field(default_factory=lambda: Position(0, 0.0, 0.0, asdict(Evaluations())))
    steps: KeySteps = field(init=False)
    """Those of the table that are made."""

    def __post_init__(self) -> None:
        self.steps = KeySteps(self.table)

    @property
    def parts(self) -> dict[str, Stateful]:
        """What else carries state from one update to the next."""
        found: dict[str, Stateful | None] = {
            "models": self.models, "rollout": self.rollout, "method": self.method,
            "surgery": self.engine, "retain": self.retain, "ema": self.ema, "guard": self.engine.guard,
            "attack": None if self.meta is None else self.meta.attack, "steps": self.steps, "watch": self.watch,
        }  # fmt: skip
        return {name: part for name, part in found.items() if part is not None}

    def next_step(self) -> KeyStep | None:
        """The key step of the next update; None: there is none left, or the concepts are gone."""
        if self.watch is not None and self.watch.progress.ended:
            return None
        return self.steps.take(self.position.update, self._left_out)

    @property
    def _left_out(self) -> frozenset[int]:
        """Concepts that are done; none where each rank has its own, since all have to make equally many updates."""
        if self.watch is None or self.cfg.train.spread_concepts:
            return frozenset()
        return self.watch.progress.done

    def look_is_due(self, update: int) -> bool:
        """Whether a probe belongs after so many updates: it is its turn, or they were the last."""
        return self.watch is not None and (self.watch.is_due(update) or self.steps.ends(self._left_out))

    def look(self, update: int) -> Reading:
        """Probe what the run has made of the model so far. Collective."""
        assert self.watch is not None
        return self.watch.look(update, self.models, self.export_weights)

    def final_weights(self) -> ExportedWeights:
        """What remains of the run. Collective."""
        return self.export_weights() if self.watch is None else self.watch.weights(self.export_weights, self.edited)

    def export_weights(self) -> ExportedWeights:
        """What the run has changed so far. Collective: every rank must call it."""
        if self.ema is not None:
            trained = ExportedWeights(self.ema.export(), rounded=self.cfg.bf16_weights)
        else:
            trained = self.engine.export_weights()
        return replace(trained, edited=self.edited)


def prepare(cfg: Config, world: World, resume: Path | None = None) -> Run:
    """Load the model, embed all prompts once, free what training does not need, shard the rest, resume if asked."""
    check_attention(cfg.model.attention, world.device, DTYPES[cfg.compute_dtype])
    if world.is_main:
        public_name(cfg.model), public_hash(cfg.model)  # which model it is, as long as its files are there
    stored = stored_dtype(cfg.model) if cfg.bf16_weights else None  # loses nothing, and SDXL in fp32 takes 10 GB
    pipeline = load_pipeline(cfg.model.pretrained_model_name_or_path, options=cfg.model, unet_dtype=stored)
    asked, cfg = cfg, with_neighbours(cfg, pipeline, world)
    method = build_method(cfg)
    folder = encode_folder(cfg, pipeline, world.device) if cfg.retains and cfg.retain_source == "folder" else None
    retained = folder.prompts if folder is not None else retain_prompts(cfg) if cfg.retains else []
    meta_folders = encode_sets(cfg, pipeline, world.device)
    others = [*meta_texts(cfg), *(prompt for pool in meta_folders.values() for prompt in pool.prompts)]
    others += probe_texts(cfg)
    prompt_table = build_prompt_table(named_concepts(cfg), cfg.prompts, cfg.seed, retained, others)
    edited = method.edit(pipeline, world.device) if cfg.closed_form else {}
    set_trainable(pipeline.unet, trainable_names(pipeline.unet, resolved_scope(cfg)))
    originals = trained_tensors(pipeline.unet) | edited
    cfg = with_learning_rate(cfg, originals)
    backbone = build_backbone(
        pipeline,
        prompt_table.texts,
        cfg.train.resolution,
        world.device,
        DTYPES[cfg.weight_dtype],
        autocast=cfg.autocast,
    )
    eyes = open_eyes(cfg, pipeline, world.device)
    del pipeline  # with it go the text encoders and, unless somebody looks at probes, the VAE
    watch = start_watch(cfg, backbone, prompt_table, world, eyes)
    models, engine, ema = shard(cfg, backbone, originals, world, edited)
    models.evaluations.probe += 0 if watch is None else watch.probe.evaluations
    del originals
    if cfg.teacher.in_8_bits:
        accepted = check_teacher(cfg.teacher, target_errors(models, prompt_table, cfg.seed))
        if world.is_main:
            print(accepted)
    layout = BatchLayout(
        world.rank, world.world_size, cfg.train.train_batch_size, cfg.train.gradient_accumulation_steps
    )
    pool = targets = None
    if method.spec.samples == "anchors":
        pool = generate_pool(cfg, models, prompt_table, anchor_prompts(prompt_table))
    table = rank_table(cfg, world.rank, world.world_size)
    if cfg.teacher.storage == "cached":
        targets = sample_targets(cfg, models, prompt_table, table, world.is_main)
    rollout = build_sampler(cfg, models, prompt_table, layout, pool, targets)
    run = Run(cfg, world, method, table, models, rollout, engine, ema=ema, watch=watch, asked=asked, edited=edited)
    if cfg.retains:
        pictures = pool if cfg.retain_source == "anchors" else folder
        run.retain = build_source(cfg, models, prompt_table, world, pictures)
    if cfg.has_meta:
        sets = MetaSets(cfg, models, prompt_table, world, draw_sets(cfg, models, prompt_table, meta_folders))
        run.meta = MetaObjective(cfg, models, sets, engine, world)
    if targets is not None:
        models.retire_teacher()  # from the first update on, the student is no longer the original
    if resume is not None:
        _resume(run, resume)
    return run


def start_watch(
    cfg: Config, backbone: Backbone, prompt_table: PromptTable, world: World, eyes: Eyes | None
) -> Watch | None:
    """The probe with the original's pictures, while the U-Net still is the original; None where none is wanted."""
    if not cfg.progress.enabled:
        return None
    probe = Probe(cfg, backbone, prompt_table, world, eyes)
    probe.originals(as_it_is(backbone))
    if world.is_main:
        for concept in (c for number, c in enumerate(cfg.concepts) if not probe.shows(number)):
            print(
                f"warning: the model draws the same with {concept.name!r} and without it, so nothing can say whether "
                "it is erased; is that what the model calls it?",
                file=sys.stderr,
            )
    return Watch(probe, Progress(cfg.progress, cfg.stops_when_erased, start=first_student_update(cfg)))


@dataclass(frozen=True)
class Edit:
    """What a closed-form method without any updates has done, and what it took."""

    tensors: dict[str, Tensor]
    seconds: float
    keep: list[str]
    """What was kept, chosen where none was named."""
    probe_seconds: float = 0.0
    progress: Progress | None = None
    evaluations: int = 0
    """Of the probe."""


def with_learning_rate(cfg: Config, originals: Mapping[str, Tensor]) -> Config:
    """The learning rate that was left open, from the rms of the matrices and kernels that are trained: Adam moves each
    weight by about the rate, so that models of another scale move alike."""
    if cfg.train.learning_rate is not None:
        return cfg
    large = [weight for weight in originals.values() if weight.ndim > 1] or list(originals.values())
    squares = sum(weight.double().square().sum().item() for weight in large)
    rms = (squares / sum(weight.numel() for weight in large)) ** 0.5
    return cfg.model_copy(
        update={"train": cfg.train.model_copy(update={"learning_rate": cfg.train.relative_step * rms})}
    )


def edit(cfg: Config, world: World) -> Edit:
    """A closed-form method without any updates, for one rank; probed before and after."""
    pipeline = load_pipeline(
        cfg.model.pretrained_model_name_or_path, options=cfg.model, unet_dtype=stored_dtype(cfg.model)
    )
    started = time.perf_counter()
    cfg = with_neighbours(cfg, pipeline, world)
    tensors = build_method(cfg).edit(pipeline, world.device)
    done = Edit(tensors, time.perf_counter() - started, keep=cfg.keep)
    if not cfg.progress.enabled:
        return done
    started = time.perf_counter()
    table = build_prompt_table(named_concepts(cfg), cfg.prompts, cfg.seed, others=probe_texts(cfg))
    compute = DTYPES[cfg.compute_dtype]
    backbone = build_backbone(pipeline, table.texts, cfg.train.resolution, world.device, compute)
    eyes = open_eyes(cfg, pipeline, world.device)
    watch = start_watch(cfg, backbone, table, replace(world, world_size=1), eyes)
    assert watch is not None
    put_in_place(backbone.unet, tensors)
    watch.progress.add(watch.probe.look(0, as_it_is(backbone)))
    return replace(
        done,
        probe_seconds=time.perf_counter() - started,
        progress=watch.progress,
        evaluations=watch.probe.evaluations,
    )


def shard(
    cfg: Config,
    backbone: Backbone,
    originals: Mapping[str, Tensor],
    world: World,
    edited: Mapping[str, Tensor] | None = None,
) -> tuple[Predictors, Engine, Ema | None]:
    """The student under its engine, its frozen original, and the average of its weights where the method has one.

    ``originals``: the tensors before any cast from which the training starts, the trained ones and those of an edit in
    closed form; ``edited``: these alone. The teacher is made before the student gets them.
    """
    unet = backbone.unet.train()
    if cfg.model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    attention = install_attention(unet, cfg.model.attention, device=world.device, dtype=DTYPES[cfg.compute_dtype])
    if cfg.method_spec.stops_first_token_gradient(cfg):
        stop_first_token_gradient(unet)
    keys = PromptKeys(unet, backbone.embeds, backbone.autocast) if cfg.model.cache_prompt_keys else None
    teacher = None
    if cfg.needs_teacher:
        teacher = Teacher(unet, list(originals), whole_copy=cfg.zero_stage == 3, storage=cfg.teacher.storage)
    put_in_place(unet, edited or {})
    engine: Engine = cfg.engine_spec.build(unet, cfg, world, originals)
    if cfg.model.channels_last:
        apply_channels_last(unet)
    if cfg.model.compile == "regional":
        compile_blocks(unet)
    if world.is_main:
        count = sum(originals[name].numel() for name in engine.named)
        how = f"{attention}; kernels: {describe(world.device)}; {cfg.engine_spec.title(cfg)}"
        rate = f"learning rate {cfg.learning_rate:.3g}"
        print(f"{cfg.method}: {len(engine.named)} tensors, {count:,} parameters trained, {rate}; {how}")
    weights = GraphedSampler(engine.sampler) if cfg.model.cuda_graphs else engine.sampler
    ema = exponential_average(cfg, engine)
    own_keys = keys if originals.keys().isdisjoint(trainable_names(unet, KEYS_AND_VALUES)) else None
    # As long as nothing is trained, the student is its own teacher.
    models = Predictors(backbone, engine, weights, teacher or engine.sampler, ema, keys, own_keys)
    return models, engine, ema


def exponential_average(cfg: Config, engine: Engine) -> Ema | None:
    """The average of the student's weights, which walks the trajectories, where the method has one."""
    settings = cfg.method_spec.average(cfg)
    if settings is None:
        return None
    decay, warmup = settings
    return Ema(engine.sampler, engine.named, decay, warmup=warmup)


def _resume(run: Run, folder: Path) -> None:
    run.position = load_checkpoint(folder, run.world, run.engine, run.parts)
    if run.world.is_main:
        print(f"resumed from {folder} at update {run.position.update}")
