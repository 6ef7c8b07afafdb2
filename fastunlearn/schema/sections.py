"""The sections of the configuration that every run has: names, types, defaults and ranges, with a docstring under each
field, from which TOML, command line and ``--help`` follow.

The section of a method or an engine stands in its own file (``methods/``, ``engines/``); rules across fields are in
``config/``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fastunlearn.registry import CLASSIFIERS, FORMATS, METRICS, OPTIMIZERS
from fastunlearn.schema.fields import (
    AttentionBackend,
    Beta,
    ConceptKind,
    ConfigModel,
    Fraction,
    GradientDtype,
    KnownIn,
    LossWeighting,
    MixedPrecision,
    NonNegativeFloat,
    NonNegativeInt,
    PathStr,
    PositiveFloat,
    PositiveInt,
    PredictionType,
    SamplerSteps,
    Scope,
    StrippedStr,
    WeightDtype,
)


class Concept(ConfigModel):
    """One concept to erase; in TOML a plain string, or a table with these fields."""

    name: StrippedStr
    """The words that stand for the concept in a prompt, such as "neon style" or "cat"."""
    anchor: StrippedStr = ""
    """What to draw instead; empty: nothing, the model falls back to what it draws without a prompt."""
    kind: Literal["auto", ConceptKind] = "auto"
    """Decides the defaults of prompts, method and scope; auto: from the name."""
    contexts: list[StrippedStr] = []
    """What it is shown with where prompts.templates are left open; none: prompts.contexts, those of ``keep`` of the
    other kind, or a few plain ones."""


class ModelConfig(ConfigModel):
    """Which model is edited, and how it is run."""

    pretrained_model_name_or_path: PathStr = "minicanvas"
    """"minicanvas" (the embedded model), a diffusers folder, one .safetensors file, or a hub id such as "org/name"."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    variant: str | None = None
    """Variant of the weight files, such as "fp16"."""
    cache_dir: PathStr | None = None
    """Where hub models are kept; none: the hub's own cache (HF_HOME)."""
    local_files_only: bool = False
    """Never download: use what is in the hub cache."""
    vae: PathStr | None = None
    """Another VAE, a folder or a file, such as SDXL's made for fp16. VAEs compute in fp32 here, where all are safe."""
    prediction_type: Literal["auto", PredictionType] = "auto"
    """What the U-Net predicts; auto: as the scheduler's configuration, or the single file, says."""
    rescale_betas_zero_snr: Literal["auto", True, False] = "auto"
    """Whether the noise schedule ends in pure noise (zero terminal SNR); auto: as the model says."""
    mixed_precision: MixedPrecision = "no"
    """"bf16" computes in bfloat16 with fp32 master weights; "no" computes in fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    attention: AttentionBackend = "auto"
    """Attention implementation of the U-Net; only auto may fall back."""
    channels_last: bool = False
    """Hand every convolution its input with the channels last in memory; same results, not measured on a GPU yet."""
    compile: Literal["no", "regional"] = "no"
    """"regional" compiles the repeated transformer blocks when they are first called; not at ZeRO stage 3."""
    cuda_graphs: bool = False
    """Replay the sampler's calls of the student as CUDA graphs; not at ZeRO stage 3, not measured yet."""
    cache_prompt_keys: bool = False
    """Compute keys and values of the prompts once, for calls without a gradient of weights that are not trained. On
    SDXL less than 1 % of a call's operations, for 26 MB a prompt in bf16."""


class PromptsConfig(ConfigModel):
    """Which prompts the training trajectories follow."""

    templates: list[str] = []
    """Prompts of the trajectories; each holds {concept} or {word} (it without " style"), and may hold {context}. None
    given: some that suit the kind of each concept (docs/methods.md)."""
    contexts: list[str] = []
    """Filled into {context}: kept styles for an object concept, kept objects for a style concept. None given, and no
    templates either: those of ``keep``, or a few plain ones."""
    contextual_anchor: bool = True
    """Measure a template with {context} against the same template without the concept, not against the empty prompt."""
    anchor_templates: list[str] = []
    """Aligned with templates: the prompt once the concept is removed, such as "a picture in {context} style"."""
    augment_fraction: Fraction = 0.05
    """Last share of the updates that train on perturbed prompts."""
    augment_embedding_noise: NonNegativeFloat = 1e-5
    """Standard deviation of the noise on the embeddings of perturbed prompts."""
    augment_pool: PositiveInt = 10
    """Number of perturbed prompts per concept."""


class TrainConfig(ConfigModel):
    """Length, step size and scope of the training."""

    max_train_steps: PositiveInt | None = None
    """Number of optimizer updates; none: the default of the method and the concept's kind."""
    train_batch_size: PositiveInt = 1
    """Trajectories that each rank walks in lockstep."""
    spread_concepts: bool = False
    """Give each rank concepts of its own instead of all ranks the same one in turn; not at ZeRO stage 3."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches whose gradients are averaged into one update."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate; none: ``relative_step`` times the rms of the weights that are trained, whatever their
    scale."""
    relative_step: PositiveFloat = 5e-3
    """By how much of its rms an update moves a weight, about, where no learning rate is given."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    lr_warmup_steps: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly from zero."""
    loss_weighting: LossWeighting = "prediction"
    """What the losses of kscu, esd and sdd are between. It matters for models that do not predict epsilon: prediction,
    what the network puts out, weights all timesteps alike, as the published code does; epsilon, the noise that
    predictions imply, gives a v-model's loss at timestep t the weight alpha-bar(t), so that the noisy ones, where a
    picture takes shape, count next to nothing and a style may stay."""
    max_grad_norm: NonNegativeFloat = 0.0
    """Clip the gradient to this global norm; 0: no clipping."""
    resolution: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    """Side of the square image in pixels; none: the size the model was made for."""
    logging_steps: PositiveInt = 10
    """Updates between two entries in the TensorBoard curves."""
    cpu_threads: NonNegativeInt = 0
    """Threads per rank on a CPU; 0: cores divided by ranks."""
    memory_check: Literal["refuse", "warn", "off"] = "refuse"
    """What happens where the memory plan says that the run cannot fit, with room for the plan's own error."""
    scope: Literal["auto", Scope] = "auto"
    """Which U-Net tensors are trained; auto: by method and kind of concept. attn2: cross-attention; attn2_kv: its keys
    and values; selfattn: self-attention; attn: both attentions; noxattn: all but cross-attention, the first and last
    convolution and the embeddings of timestep and size, as in ESD's code for SDXL, which warns that this works less
    well there; noxattn_all: with these, as KSCU's code for SD 1.4; full: everything."""


class OptimizerConfig(ConfigModel):
    """The optimizer that DeepSpeed steps."""

    name: Annotated[str, AfterValidator(KnownIn(OPTIMIZERS))] = "adamw"
    """Which one; `fastunlearn doctor` says what each needs, and whether it is there."""
    adam_beta1: Beta = 0.9
    """Decay of the first moment."""
    adam_beta2: Beta = 0.999
    """Decay of the second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    adam_weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""


class SamplerConfig(ConfigModel):
    """The sampler of the training trajectories."""

    name: Literal["ddim", "euler"] = "ddim"
    """DDIM with eta 0, or Euler, SDXL's usual one: also of the generated pictures. The same steps but for the last,
    which Euler takes to no noise at all. Evaluation pictures are drawn with DDIM."""

    num_inference_steps: SamplerSteps = 20
    """Steps from noise to image, of which every one is trained: fewer bring more trajectories into as many updates."""
    guidance_scale: NonNegativeFloat = 3.0
    """Classifier-free guidance along the trajectory."""


class SurgeryConfig(ConfigModel):
    """Gradient surgery: what the unlearning gradient does against the retain gradient is taken out of it."""

    enabled: Literal["auto", True, False] = "auto"
    """Project every update. auto: where anything is kept, and the method has updates of its own; without a keep list
    not where teacher.storage "cached" leaves nothing to hold it to. Some methods always do, unless projection is
    "none"; false leaves it to them."""
    projection: Literal["textbook", "released", "none"] = "textbook"
    """textbook: u - strength min(0, <u,r>) / <r,r> r; released: DoCo's published code, which over-projects; none."""
    granularity: Literal["tensor", "block", "global"] = "tensor"
    """What has a coefficient of its own: each tensor, each block of the U-Net, or all together."""
    two_sided: bool = False
    """Also remove what the gradients have in common, not only where they conflict."""
    strength: Fraction = 1.0
    """Fraction of the conflicting component that is removed."""
    rho: NonNegativeFloat | None = None
    """Weight with which the retain gradient itself is added after the projection; 0: the published rule. None given: 5
    where ``enabled`` is auto, else 0."""
    metric: Literal["raw", "optimizer"] = "raw"
    """Dot products of the gradients, or of what AdamW will make of them, weighted by 1 / (sqrt(v) + eps)."""
    retain_dtype: Literal["auto", GradientDtype] = "auto"
    """How the retain gradient is kept until the unlearning gradient is there; auto: as it came."""
    retain_device: Literal["device", "host"] = "device"
    """Where it is kept."""
    retain_ema: Beta = 0.0
    """Decay of a running mean of the retain gradient; 0: that of this update alone."""
    max_skipped_updates: PositiveInt = 5
    """Updates in a row with a gradient that is not finite before the run stops."""


class RetainConfig(ConfigModel):
    """The samples whose gradient protects what must be kept."""

    source: Literal["auto", "generated", "anchors", "folder", "prompts"] = "auto"
    """generated: the model's own pictures; anchors: its pictures of the anchors; folder: images with captions; prompts:
    trajectories, no pictures at all; auto: as the method has it."""
    prompts: list[str] = []
    """Prompts of what must be kept; none given: the concepts of ``keep``, alone and with each other."""
    neighbours: NonNegativeInt = 8
    """Where ``keep`` names nothing: so many things and so many styles are kept, of a list of common names those nearest
    to what is erased in the text encoder's space; 0: none. On MiniCanvas all that are not erased are."""
    folder: PathStr | None = None
    """Images with captions: ``metadata.jsonl`` (file_name, text), or a .txt beside each image."""
    target: Literal["teacher", "noise"] = "teacher"
    """What the student is held to: the frozen model's prediction, or the noise that was added."""
    timesteps: Literal["auto", "key", "uniform"] = "auto"
    """key: that of the unlearning window; uniform: drawn for each sample; auto: as the method has it."""
    batch_size: PositiveInt | None = None
    """Retain samples per rank and micro-batch; none: 1 where ``surgery.enabled`` is left open, else 4."""
    num_images: PositiveInt = 64
    """Pictures that are generated once, as latents, before training."""
    guidance_scale: NonNegativeFloat = 4.0
    """Classifier-free guidance of the generated pictures."""
    num_inference_steps: SamplerSteps = 25
    """Sampler steps of the generated pictures."""


class TeacherConfig(ConfigModel):
    """The frozen original of what is trained."""

    storage: Literal["exact", "int8", "fp8", "cached"] = "exact"
    """exact: in the type of the computation; int8 or fp8: half of bf16, brought back layer by layer. The error that
    this makes in the targets is measured before training. cached: none, targets are made once, before training."""
    trajectories: PositiveInt = 16
    """cached: how many of the original model's trajectories are stored for each concept, on the host."""
    max_error: PositiveFloat = 0.02
    """Largest error of a target that is accepted, relative to the prediction, at any timestep that is measured."""

    @property
    def in_8_bits(self) -> bool:
        """Whether it has to be brought back before a call."""
        return self.storage in ("int8", "fp8")


class CheckpointConfig(ConfigModel):
    """Resumable checkpoints."""

    checkpointing_steps: NonNegativeInt = 0
    """Updates between checkpoints; 0: none."""
    checkpoints_total_limit: PositiveInt = 2
    """How many checkpoints are kept; the oldest goes first."""


class ProgressConfig(ConfigModel):
    """Probes: a few held-out pictures that are drawn now and then, as latents, to see how far the erasure is."""

    enabled: bool = True
    """Probe the run at all. Methods in closed form are probed before and after."""
    stop: Literal["auto", True, False] = "auto"
    """End once the concepts are gone, and keep the best probe's weights; auto: unless a meta term goes on, whose work
    begins where the erasure ends."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Gone means: so much of a concept's pictures has moved by more than 0.8 (1: as far as what the prompt without it
    gives is from them) ..."""
    quantile: float = 0.95
    """... and all but a fifth by at least so much ..."""
    in_a_row: PositiveInt = 3
    """... in so many probes in a row."""
    max_drift: PositiveFloat | None = None
    """End, and say so, where pictures of what is kept change by more; 1: as far as two pictures are apart."""
    every: Literal["auto"] | PositiveInt = "auto"
    """Updates between probes; auto: after 2, 4, 8, 16, 32, 48, 64, 96, ... 256, 320, ..."""
    pairs: Annotated[int, Field(ge=2, le=1000)] = 8
    """Pictures of each concept; half as many of what is kept."""
    num_inference_steps: SamplerSteps = 6
    """Sampler steps of each."""
    guidance_scale: NonNegativeFloat = 4.0
    """Classifier-free guidance of each."""
    batch_size: PositiveInt | None = None
    """Pictures that are drawn at a time; none: train.train_batch_size, which needs no more memory than trajectories."""
    classifier: Annotated[str, AfterValidator(KnownIn(CLASSIFIERS, "none"))] = "none"
    """Who looks at the concepts' pictures, too, and must no longer see them; it needs enough steps for a picture."""


class ReportConfig(ConfigModel):
    """Curves and pictures of the run."""

    report_to: Literal["tensorboard", "none"] = "tensorboard"
    """Where the curves go."""
    validation_prompts: list[str] = []
    """Extra prompts for samples/before_after.png."""
    num_validation_seeds: PositiveInt = 2
    """Pictures per prompt."""


class EvaluationConfig(ConfigModel):
    """The measurement before and after."""

    mode: Literal["auto", "off"] = "auto"
    """auto: evaluate where a classifier knows the model and the concepts, that is on MiniCanvas."""
    classifier: Annotated[str, AfterValidator(KnownIn(CLASSIFIERS, "auto"))] = "auto"
    """Who looks at the pictures; auto: the first that knows the model and the concepts."""
    metrics: list[Annotated[str, AfterValidator(KnownIn(METRICS))]] = list(METRICS)
    """Which figures are reported."""
    num_inference_steps: SamplerSteps = 25
    """Sampler steps per evaluation image."""
    guidance_scale: NonNegativeFloat = 4.0
    """Classifier-free guidance of the evaluation images."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [188, 288, 588, 688, 888, 1188, 1288, 1588]
    """Seeds of the initial noise, the same before and after."""
    target_seeds: PositiveInt = 8
    """How many of the seeds are drawn for prompts with an erased concept."""
    retain_seeds: PositiveInt = 2
    """How many of the seeds are drawn for prompts without one."""
    batch_size: PositiveInt = 20
    """Images per batch."""


class ExportConfig(ConfigModel):
    """The weights that a run leaves."""

    formats: Annotated[list[Annotated[str, AfterValidator(KnownIn(FORMATS))]], Field(min_length=1)] = ["unet", "delta"]
    """What is written; "unet" must be among them, since evaluation and relearning read it."""
    dtype: Literal["auto", WeightDtype] = "auto"
    """Type of unet/; auto: that of the base model's U-Net files."""
