"""The fields of a whole run, and what a field that was left open stands for. No rules: ``config.py`` adds those.

A method or an engine that has settings brings its section along: the class that it declares becomes a field of its
name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, create_model, field_validator

from fastunlearn.prompts.vocabulary import GENERIC, MINICANVAS, ConceptVocabulary
from fastunlearn.registry import ENGINES, METHODS, OPTIMIZERS, Registry
from fastunlearn.schema.fields import ConfigModel, KnownIn, PathStr, StrippedStr, WeightDtype, one_name
from fastunlearn.schema.meta import MetaConfig, is_active
from fastunlearn.schema.sections import (
    CheckpointConfig,
    Concept,
    EvaluationConfig,
    ExportConfig,
    ModelConfig,
    OptimizerConfig,
    ProgressConfig,
    PromptsConfig,
    ReportConfig,
    RetainConfig,
    SamplerConfig,
    SurgeryConfig,
    TeacherConfig,
    TrainConfig,
)
from fastunlearn.utils.text import without_style

UNASKED_RHO = 5.0  # the gradient of what is kept is about a tenth of the other: its loss is small until it is harmed
META_STEPS = 100  # of the meta term alone, after an edit in closed form (arXiv 2410.12777)


class FixedSections(ConfigModel):
    """The fields that every run has."""

    method: Annotated[str, AfterValidator(KnownIn(METHODS))] = "kscu"
    """The erasure method."""
    engine: Annotated[str, AfterValidator(KnownIn(ENGINES))] = "zero"
    """zero: DeepSpeed, on any number of GPUs; fused: one GPU, layers projected and stepped as their gradients come."""
    concepts: list[Concept] = Field(default_factory=list)
    """What to erase: strings, or tables {name, anchor, kind}."""
    keep: list[StrippedStr] = Field(default_factory=list)
    """Concepts that must survive; they are held, drawn and measured. None given: see ``retain.neighbours``."""
    output_dir: PathStr = "outputs/run"
    """Folder that receives everything that the run leaves."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of trajectories, augmentation and pictures."""
    overwrite_output_dir: bool = False
    """Replace the results of an earlier run in output_dir."""
    resume_from_checkpoint: PathStr | None = None
    """"latest", or a checkpoint folder to continue from."""
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sampler: SamplerConfig = SamplerConfig()
    surgery: SurgeryConfig = SurgeryConfig()
    retain: RetainConfig = RetainConfig()
    meta: MetaConfig = MetaConfig()
    teacher: TeacherConfig = TeacherConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    progress: ProgressConfig = ProgressConfig()
    report: ReportConfig = ReportConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()

    @field_validator("concepts", mode="before")
    @classmethod
    def _accept_plain_names(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [{"name": one_name("concepts", item)} if isinstance(item, str) else item for item in value]

    @field_validator("keep", mode="before")
    @classmethod
    def _one_name_each(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [one_name("keep", item) if isinstance(item, str) else item for item in value]

    @property
    def method_spec(self) -> Any:
        """The facts of the method: a ``methods.base.MethodSpec``."""
        return METHODS[self.method].spec

    @property
    def engine_spec(self) -> Any:
        """The facts of the engine: an ``engines.base.EngineSpec``."""
        return ENGINES[self.engine]

    @property
    def optimizer_spec(self) -> Any:
        """The facts of the optimizer: an ``engines.optimizers.base.OptimizerSpec``."""
        return OPTIMIZERS[self.optimizer.name]

    @property
    def vocabulary(self) -> ConceptVocabulary:
        """What the names of concepts mean to this model."""
        return MINICANVAS if self.uses_minicanvas else GENERIC

    def kind_of(self, concept: Concept) -> str:
        """The given kind, or the one that the name suggests: style, object, nudity or instance."""
        return concept.kind if concept.kind != "auto" else self.vocabulary.kind_of(concept.name)

    @property
    def closed_form(self) -> bool:
        """Whether the method edits the weights in one step, before any training."""
        return self.method_spec.closed_form

    @property
    def trains(self) -> bool:
        """Whether there are updates at all, and so an engine, an optimizer and checkpoints."""
        return not self.closed_form or self.has_meta

    @property
    def max_train_steps(self) -> int:
        """``train.max_train_steps`` with the default of method and concepts filled in."""
        if self.train.max_train_steps is not None:
            return self.train.max_train_steps
        return META_STEPS if self.closed_form and self.has_meta else self.method_spec.default_steps(self)

    @property
    def needs_teacher(self) -> bool:
        """Whether the frozen original of what is trained is kept: not where its targets are made before training, nor
        where the targets are the student's own."""
        asked = self.method_spec.asks_teacher or self.retains or (self.has_meta and not self.meta.ascends)
        return self.teacher.storage != "cached" and asked

    @property
    def retains(self) -> bool:
        """Whether there is a retain gradient, and so a retain set: where surgery is on, which for some methods it
        always is."""
        idle = self.surgery.projection == "none" and self.rho == 0.0
        return (self.asks_surgery or self.method_spec.always_retains) and not idle

    @property
    def asks_surgery(self) -> bool:
        """``surgery.enabled``, where "auto" stands for whatever protects what is kept."""
        if self.surgery.enabled != "auto":
            return self.surgery.enabled
        can_hold = self.engine_spec.has_surgery and self.teacher.storage != "cached"
        unasked = can_hold and (self.chooses_neighbours or bool(resolved_keep(self)))
        return not self.closed_form and (bool(self.keep) or unasked)

    @property
    def chooses_neighbours(self) -> bool:
        """Whether the model is asked what to keep: nothing is named, and what it knows cannot be known before."""
        return not self.keep and self.vocabulary.known_names() is None and self.retain.neighbours > 0

    @property
    def surgery_settings(self) -> SurgeryConfig:
        """``[surgery]`` with what was left open filled in."""
        return self.surgery.model_copy(update={"enabled": self.asks_surgery, "rho": self.rho})

    @property
    def rho(self) -> float:
        """``surgery.rho`` with its default filled in."""
        if self.surgery.rho is not None:
            return self.surgery.rho
        return UNASKED_RHO if self.protects_unasked else 0.0

    @property
    def protects_unasked(self) -> bool:
        """Whether surgery is on because something is kept, and for no other reason."""
        return self.surgery.enabled == "auto" and self.asks_surgery and not self.method_spec.always_retains

    @property
    def has_meta(self) -> bool:
        """Whether updates have a meta term that has any influence."""
        return is_active(self.meta)

    @property
    def attack_learning_rate(self) -> float:
        """Of the meta term's simulated attack: ``meta.inner_learning_rate``, or else that of the training."""
        return self.meta.inner_learning_rate or self.learning_rate

    @property
    def learning_rate(self) -> float:
        """``train.learning_rate``, once it is known: before the weights have been read it may be left open."""
        if self.train.learning_rate is None:
            raise ValueError("train.learning_rate follows from the weights that are trained; see with_learning_rate")
        return self.train.learning_rate

    @property
    def retain_source(self) -> str:
        """``retain.source`` with auto filled in: trajectories, without pictures, where surgery was not asked for."""
        if self.retain.source == "auto" and self.protects_unasked and self.retain.target == "teacher":
            return "prompts"
        return self.method_spec.retain_source if self.retain.source == "auto" else self.retain.source

    @property
    def retain_batch_size(self) -> int:
        """``retain.batch_size`` with its default filled in."""
        return self.retain.batch_size or (1 if self.protects_unasked else 4)

    @property
    def retain_timesteps(self) -> str:
        """``retain.timesteps`` with auto filled in."""
        return self.method_spec.retain_timesteps if self.retain.timesteps == "auto" else self.retain.timesteps

    @property
    def stops_when_erased(self) -> bool:
        """Whether the run ends once its probes say that the concepts are gone."""
        progress = self.progress
        wanted = not self.has_meta if progress.stop == "auto" else bool(progress.stop)
        return progress.enabled and self.trains and wanted

    @property
    def probe_batch_size(self) -> int:
        """``progress.batch_size`` with its default filled in."""
        return self.progress.batch_size or self.train.train_batch_size

    @property
    def zero_stage(self) -> int:
        """What is sharded; 0 under the fused engine, and where nothing is trained."""
        return self.engine_spec.stage(self) if self.trains else 0

    @property
    def bf16_weights(self) -> bool:
        """Whether the U-Net is held in bf16. ZeRO-0 has no fp32 masters: there it stays fp32, under autocast."""
        return self.model.mixed_precision == "bf16" and self.engine_spec.holds_bf16(self)

    @property
    def autocast(self) -> bool:
        """Whether the U-Net computes in bf16 from fp32 weights."""
        return self.model.mixed_precision == "bf16" and not self.bf16_weights

    @property
    def weight_dtype(self) -> WeightDtype:
        """The dtype in which the U-Net is held."""
        return "bf16" if self.bf16_weights else "fp32"

    @property
    def compute_dtype(self) -> WeightDtype:
        """The dtype in which the U-Net computes, from weights of that dtype or under autocast."""
        return "bf16" if self.model.mixed_precision == "bf16" else "fp32"

    @property
    def uses_minicanvas(self) -> bool:
        """Whether the embedded model is edited."""
        return self.model.pretrained_model_name_or_path == "minicanvas"


def sections_of(*registries: Registry) -> dict[str, Any]:
    """(type, default) of each section that an entry of the registries brings along, by its name."""
    specs = [(name, getattr(entry, "spec", entry)) for registry in registries for name, entry in registry.items()]
    return {name: (spec.Settings, spec.Settings()) for name, spec in specs if spec.Settings is not None}


if TYPE_CHECKING:

    class RunConfig(FixedSections):
        """All fields of a run."""

        def __getattr__(self, name: str) -> Any:
            """A section that a method or an engine brings along."""

else:
    RunConfig = create_model("RunConfig", __base__=FixedSections, __module__=__name__, **sections_of(METHODS, ENGINES))


def resolved_steps(cfg: RunConfig) -> int:
    """Number of updates: the given one, or the method's own for these concepts."""
    return cfg.max_train_steps


def first_student_update(cfg: RunConfig) -> int:
    """The first update that changes the model: before it, only what the method itself has to learn is trained."""
    return cfg.method_spec.first_student_update(cfg)


def student_updates(cfg: RunConfig) -> int:
    """How many of the run's updates change the model, over which its learning rate is planned."""
    return resolved_steps(cfg) - first_student_update(cfg)


def resolved_scope(cfg: RunConfig) -> str:
    """The trained scope: the given one, or the method's own for these concepts.

    Raises:
        UserError: concepts whose kinds train different scopes.
    """
    if cfg.train.scope != "auto":
        return cfg.train.scope
    if cfg.closed_form and cfg.has_meta:
        return "full"
    return cfg.method_spec.default_scope(cfg)


def named_concepts(cfg: RunConfig) -> list[Concept]:
    """The concepts with kind and contexts filled in."""
    return [_named(cfg, concept) for concept in cfg.concepts]


def _named(cfg: RunConfig, concept: Concept) -> Concept:
    kind = cfg.kind_of(concept)
    contexts = concept.contexts or cfg.prompts.contexts or _kept_contexts(cfg, kind)
    return concept.model_copy(update={"kind": kind, "contexts": contexts})


def _kept_contexts(cfg: RunConfig, kind: str) -> list[str]:
    """What is kept of the other kind: things for a style, styles' words for an object."""
    if kind not in ("style", "object"):
        return []
    styles = [name for name in resolved_keep(cfg) if cfg.vocabulary.kind_of(name) == "style"]
    if kind == "object":
        return [without_style(name) for name in styles]
    return [name for name in resolved_keep(cfg) if name not in styles]


def resolved_keep(cfg: FixedSections) -> list[str]:
    """The concepts to keep: the given ones, or on MiniCanvas, where all names are known, all that are not erased."""
    known = cfg.vocabulary.known_names()
    if cfg.keep or known is None:
        return list(cfg.keep)
    identity = cfg.vocabulary.identity
    erased = {identity(concept.name) for concept in cfg.concepts}
    return [name for name in known if identity(name) not in erased]
