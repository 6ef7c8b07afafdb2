"""The configuration of a run: reading it, the rules across its fields, the defaults that depend on method and concept.
Not here: the fields themselves (`schema/`), or checks of the disk (`training/preflight.py`)."""

from fastunlearn.config.base import (
    first_student_update,
    resolved_keep,
    resolved_scope,
    resolved_steps,
    student_updates,
)
from fastunlearn.config.config import Config, config_from_arguments, config_of, load_config, run_options
from fastunlearn.schema.meta import MetaConfig
from fastunlearn.schema.sections import (
    CheckpointConfig,
    Concept,
    EvaluationConfig,
    ExportConfig,
    ModelConfig,
    OptimizerConfig,
    PromptsConfig,
    ReportConfig,
    RetainConfig,
    SamplerConfig,
    SurgeryConfig,
    TeacherConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "Concept",
    "Config",
    "EvaluationConfig",
    "ExportConfig",
    "MetaConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PromptsConfig",
    "ReportConfig",
    "RetainConfig",
    "SamplerConfig",
    "SurgeryConfig",
    "TeacherConfig",
    "TrainConfig",
    "config_from_arguments",
    "config_of",
    "first_student_update",
    "load_config",
    "resolved_keep",
    "resolved_scope",
    "resolved_steps",
    "run_options",
    "student_updates",
]
