"""The configuration of a run, read from TOML and overridden from the command line.

What this is: the whole ``Config`` and ``load_config``. The fields of each section are in ``config_sections.py``, rules
that span fields and the defaults that depend on method and concept in ``config_rules.py``, TOML and command-line text
in ``config_text.py``, checks of the disk in ``preflight.py``.
What this is not: nothing in these modules imports torch or touches a model.

    cfg = load_config("configs/minicanvas_style.toml", ["--train.max_train_steps", "100"])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from fastunlearn.config import concept_rules as config_rules
from fastunlearn.config import loader as config_text
from fastunlearn.config.concept_rules import (
    concept_kind,
    first_student_update,
    resolved_keep,
    resolved_scope,
    resolved_start,
    resolved_steps,
    student_updates,
)
from fastunlearn.config.method_rules import CLOSED_FORM, ReceConfig, SddConfig, UceConfig
from fastunlearn.engines.zero_config import deepspeed_config
from fastunlearn.schema.meta import MetaConfig, is_active
from fastunlearn.schema.sections import (
    CheckpointConfig,
    Concept,
    DocoConfig,
    EsdConfig,
    EvaluationConfig,
    ExportConfig,
    FusedConfig,
    KscuConfig,
    ModelConfig,
    OptimizerConfig,
    Place,
    PromptsConfig,
    ReportConfig,
    RetainConfig,
    SamplerConfig,
    Section,
    SurgeryConfig,
    TeacherConfig,
    TrainConfig,
    Words,
    ZeroConfig,
)

__all__ = [
    "CheckpointConfig",
    "Concept",
    "Config",
    "DocoConfig",
    "EsdConfig",
    "EvaluationConfig",
    "ExportConfig",
    "FusedConfig",
    "KscuConfig",
    "MetaConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PromptsConfig",
    "ReceConfig",
    "ReportConfig",
    "RetainConfig",
    "SamplerConfig",
    "SddConfig",
    "SurgeryConfig",
    "TeacherConfig",
    "TrainConfig",
    "UceConfig",
    "ZeroConfig",
    "concept_kind",
    "config_from_arguments",
    "deepspeed_config",
    "first_student_update",
    "load_config",
    "resolved_keep",
    "resolved_scope",
    "resolved_start",
    "resolved_steps",
    "student_updates",
]


class Config(Section):
    """A whole run. An instance that exists has passed every check that needs neither the disk nor the machine."""

    method: Literal["kscu", "esd", "doco", "sdd", "uce", "rece"] = "kscu"
    """The erasure method."""
    engine: Literal["zero", "fused"] = "zero"
    """zero: DeepSpeed, on any number of GPUs; fused: one GPU, layers projected and stepped as their gradients come."""
    concepts: list[Concept] = Field(default_factory=list)
    """What to erase: strings, or tables {name, anchor, kind}."""
    keep: list[Words] = Field(default_factory=list)
    """Concepts that must survive; they are drawn and measured. None given on MiniCanvas: all that are not erased."""
    output_dir: Place = "outputs/run"
    """Folder that receives everything that the run leaves."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of trajectories, augmentation and pictures."""
    overwrite_output_dir: bool = False
    """Replace the results of an earlier run in output_dir."""
    resume_from_checkpoint: Place | None = None
    """"latest", or a checkpoint folder to continue from."""
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sampler: SamplerConfig = SamplerConfig()
    kscu: KscuConfig = KscuConfig()
    esd: EsdConfig = EsdConfig()
    doco: DocoConfig = DocoConfig()
    sdd: SddConfig = SddConfig()
    uce: UceConfig = UceConfig()
    rece: ReceConfig = ReceConfig()
    surgery: SurgeryConfig = SurgeryConfig()
    retain: RetainConfig = RetainConfig()
    meta: MetaConfig = MetaConfig()
    zero: ZeroConfig = ZeroConfig()
    fused: FusedConfig = FusedConfig()
    teacher: TeacherConfig = TeacherConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    report: ReportConfig = ReportConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()

    @field_validator("concepts", mode="before")
    @classmethod
    def _accept_plain_names(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [{"name": item} if isinstance(item, str) else item for item in value]

    @model_validator(mode="after")
    def _check(self) -> Config:
        config_rules.check_config(self)
        return self

    def kind_of(self, concept: Concept) -> str:
        """The given kind, or the one that the name suggests: style, object, nudity or instance."""
        return concept.kind if concept.kind != "auto" else concept_kind(concept.name, self.uses_minicanvas)

    @property
    def closed_form(self) -> bool:
        """Whether the method edits the weights in one step, before any training."""
        return self.method in CLOSED_FORM

    @property
    def trains(self) -> bool:
        """Whether there are updates at all, and so an engine, an optimizer and checkpoints."""
        return not self.closed_form or self.has_meta

    @property
    def needs_teacher(self) -> bool:
        """Whether the frozen original of what is trained is kept: not where its targets are made before training, nor
        where the targets are the student's own."""
        asked = self.method != "sdd" or self.retains or (self.has_meta and not self.meta.ascends)
        return self.teacher.storage != "cached" and asked

    @property
    def retains(self) -> bool:
        """Whether there is a retain gradient, and so a retain set: where surgery is on, which it always is for DoCo."""
        idle = self.surgery.projection == "none" and self.surgery.rho == 0.0
        return (self.surgery.enabled or self.method == "doco") and not idle

    @property
    def has_meta(self) -> bool:
        """Whether updates have a meta term that has any influence."""
        return is_active(self.meta)

    @property
    def attack_learning_rate(self) -> float:
        """Of the meta term's simulated attack: ``meta.inner_learning_rate``, or else that of the training."""
        return self.meta.inner_learning_rate or self.train.learning_rate

    @property
    def retain_source(self) -> str:
        """``retain.source`` with auto filled in."""
        auto = "anchors" if self.method == "doco" else "generated"
        return auto if self.retain.source == "auto" else self.retain.source

    @property
    def retain_timesteps(self) -> str:
        """``retain.timesteps`` with auto filled in."""
        auto = "uniform" if self.method == "doco" or self.closed_form else "key"
        return auto if self.retain.timesteps == "auto" else self.retain.timesteps

    @property
    def zero_stage(self) -> int:
        """What is sharded; 0 under the fused engine, and where nothing is trained."""
        return self.zero.stage if self.engine == "zero" and self.trains else 0

    @property
    def bf16_weights(self) -> bool:
        """Whether the U-Net is held in bf16. ZeRO-0 has no fp32 masters: there it stays fp32, under autocast."""
        return self.model.mixed_precision == "bf16" and (self.zero_stage > 0 or self.engine == "fused")

    @property
    def uses_minicanvas(self) -> bool:
        """Whether the embedded model is edited."""
        return self.model.pretrained_model_name_or_path == "minicanvas"

    def to_toml(self) -> str:
        """This configuration as TOML; ``load_config`` reads the same one back. None is left out, being the default."""
        return config_text.emit_toml(self.model_dump())

    def resolved(self) -> Config:
        """The same run with the defaults that depend on method and concepts filled in."""
        data = self.model_dump()
        for concept, entry in zip(self.concepts, data["concepts"], strict=True):
            entry["kind"] = self.kind_of(concept)
        data["keep"] = resolved_keep(self)
        data["train"]["max_train_steps"] = resolved_steps(self) or None
        data["train"]["scope"] = resolved_scope(self)
        return Config.model_validate(data)

    def validate_runtime(self, world_size: int, cpu_count: int | None = None, has_gpu: bool = False) -> None:
        """Refuse what this machine cannot do with this many ranks; ``cpu_count`` None: the cores this process may use.

        Raises:
            UserError: too many ranks, or xformers without a GPU.
        """
        config_rules.check_runtime(self, world_size, cpu_count, has_gpu)


def load_config(path: str | None, overrides: list[str]) -> Config:
    """Read a TOML file (None: defaults only) and apply command-line overrides on top.

    Args:
        path: the file, or None.
        overrides: arguments such as ``["--train.learning_rate", "1e-4", "--concepts=cat; dog"]``.

    Raises:
        UserError: the file cannot be read, or a field is unknown, of the wrong type or out of range.
    """
    data = config_text.read_toml(path) if path is not None else {}
    config_text.merge(data, config_text.parse_overrides(overrides, Config))
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise config_text.one_line(error, Config) from None


def config_from_arguments(arguments: Sequence[str]) -> Config:
    """The configuration of ``train.py [--config FILE] [overrides]``; ``--help`` prints the options and leaves.

    Raises:
        UserError: as ``load_config``.
    """
    if "--help" in arguments or "-h" in arguments:
        print(config_text.train_help(Config))
        raise SystemExit(0)
    path, overrides = config_text.take_option(arguments, "config")
    return load_config(path, overrides)
