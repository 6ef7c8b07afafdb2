"""What we read of the JSON files in a diffusers folder: which fields, of which type and size.

A configuration is data from somebody else. What stands here is what later code takes for granted; a file that is valid
JSON of another shape, with numbers that no model has, is refused here by field, once, before anything is built of it.
Fields that nothing of ours reads may say what they like. Whether such a model can be edited is in ``foreign.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastunlearn.errors import UserError
from fastunlearn.models.formats.headers import FIELD
from fastunlearn.utils.foreign import Unreadable, json_object

Count = Annotated[int, Field(ge=1, le=2**16)]
"""Of channels, layers, tokens."""
Name = Annotated[str, Field(max_length=200)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Betas = Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=2, max_length=10_000)]
Levels = Annotated[list[Count], Field(min_length=1, max_length=16)]
Blocks = Annotated[list[Name], Field(min_length=1, max_length=16)]
PerLevel = Count | Annotated[list[Count | list[Count]], Field(min_length=1, max_length=16)]
Layers = Annotated[int, Field(ge=1, le=64)]
LayersPerLevel = Layers | Annotated[list[Layers | list[Layers]], Field(min_length=1, max_length=16)]


PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


class Described(BaseModel):
    """A configuration file, as far as it is read."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)
    class_name: Name | None = Field(None, alias="_class_name")


class ModelIndex(Described):
    """``model_index.json``: the pipeline's class, and (library, class) of each component."""

    class_name: Name = Field(alias="_class_name")
    requires_aesthetics_score: bool = False
    force_zeros_for_empty_prompt: bool = True

    @model_validator(mode="before")
    @classmethod
    def _components(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        for name, value in data.items():
            pair = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str | None) for part in value)
            if not pair and (name in PARTS or isinstance(value, list)):
                raise ValueError(f"{name[:80]}: a library and a class are needed")
        return data


class SchedulerConfig(Described):
    """``scheduler/scheduler_config.json``: the noise process."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=10_000)] = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] | None = None
    beta_end: Annotated[float, Field(gt=0, lt=1)] | None = None
    beta_schedule: Name | None = None
    trained_betas: (
        Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=2, max_length=10_000)] | None
    ) = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: Annotated[int, Field(ge=0, le=100)] = 0
    rescale_betas_zero_snr: bool = False
    clip_sample: bool = False
    set_alpha_to_one: bool = True
    use_flow_sigmas: bool | None = None


class VaeConfig(Described):
    """``vae/config.json``."""

    in_channels: Count = 3
    out_channels: Count = 3
    latent_channels: Count = 4
    block_out_channels: Levels = [64]
    layers_per_block: Layers = 1
    down_block_types: Blocks | None = None
    up_block_types: Blocks | None = None
    norm_num_groups: Count = 32
    sample_size: Count | list[Count] = 32
    scaling_factor: Positive = 0.18215
    shift_factor: Number | None = None
    latents_mean: list[Number] | None = None
    latents_std: list[Number] | None = None
    force_upcast: bool = True


class UNetConfig(Described):
    """``unet/config.json``."""

    sample_size: Count | Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    in_channels: Count = 4
    out_channels: Count = 4
    block_out_channels: Levels = [320, 640, 1280, 1280]
    down_block_types: Blocks | None = None
    up_block_types: Blocks | None = None
    layers_per_block: LayersPerLevel = 2
    norm_num_groups: Count | None = 32
    norm_eps: Positive = 1e-5
    cross_attention_dim: PerLevel = 1280
    attention_head_dim: PerLevel = 8
    num_attention_heads: PerLevel | None = None
    transformer_layers_per_block: LayersPerLevel = 1
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    addition_embed_type: Name | None = None
    addition_time_embed_dim: Count | None = None
    projection_class_embeddings_input_dim: Count | None = None
    time_cond_proj_dim: Count | None = None
    class_embed_type: Name | None = None
    num_class_embeds: Count | None = None
    encoder_hid_dim: Count | None = None
    encoder_hid_dim_type: Name | None = None

    @model_validator(mode="after")
    def _levels_agree(self) -> UNetConfig:
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            given = getattr(self, name)
            if given is not None and len(given) != levels:
                raise ValueError(f"{name}: {len(given)} entries, and block_out_channels has {levels}")
        return self


class TextEncoderConfig(Described):
    """``text_encoder/config.json``."""

    max_position_embeddings: Annotated[int, Field(ge=3, le=2**14)] = 77
    vocab_size: Annotated[int, Field(ge=3, le=2**22)] = 49408
    hidden_size: Count = 512
    intermediate_size: Count = 2048
    num_hidden_layers: Annotated[int, Field(ge=1, le=512)] = 12
    num_attention_heads: Count = 8
    projection_dim: Count = 512
    hidden_act: Name = "quick_gelu"

    @model_validator(mode="after")
    def _heads_fit(self) -> TextEncoderConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size: it is not a multiple of num_attention_heads")
        return self


SCHEMAS: dict[str, type[Described]] = {
    "model_index.json": ModelIndex,
    "scheduler_config.json": SchedulerConfig,
    "unet": UNetConfig,
    "vae": VaeConfig,
    "text_encoder": TextEncoderConfig,
    "text_encoder_2": TextEncoderConfig,
}


def read_config(file: Path, component: str | None = None) -> dict[str, Any]:
    """The content of a configuration file, all of its fields; {} where there is no such file.

    ``component``: whose it is, where its folder does not say so.

    Raises:
        UserError: it cannot be read, or a field that we read is not what it has to be.
    """
    try:
        if not file.is_file():
            return {}
        content = json_object(file)
    except Unreadable as error:
        raise UserError(f"{FIELD}: {str(file)!r} is damaged: {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{FIELD}: {str(file)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    schema = SCHEMAS.get(component or file.name) or SCHEMAS.get(file.parent.name, Described)
    check_config(content, schema, repr(str(file)))
    return content


def check_config(content: Mapping[str, Any], schema: type[Described], named: str) -> None:
    """Refuse a configuration by its first wrong field.

    Raises:
        UserError: the file, the field and what is wrong with it.
    """
    try:
        schema.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = [str(part) for part in problem["loc"] if not isinstance(part, int)]
        field = f"{place[0]}: " if place else ""
        message = problem["msg"].removeprefix("Value error, ")
        raise UserError(f"{FIELD}: {named} is no configuration that can be read: {field}{message}") from None
