"""What an architecture states: its public models as configurations, the names of its parameters, and how it is called.

Nothing outside ``models/`` knows a pipeline's class, the names of a denoiser's modules or the arguments of its forward
pass: it asks the ``Architecture``. Its files import torch inside functions only, since the configuration and the checks
of the disk read them; `prompt_embeds.py`, which they are called with, is for those that have torch loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastunlearn.registry import ARCHITECTURES

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds

START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a pipeline, and how a single file names its tensors."""

    name: str
    """The pipeline's component, such as "text_encoder"."""
    tokenizer: str
    class_name: str
    """Its class in transformers."""
    prefix: str
    """Of its tensors' names in a single file."""
    open_clip: bool
    """Whether it came from OpenCLIP: with other names in a single file, and entry 0 as padding."""

    @property
    def mark(self) -> str:
        """What tensors' names begin with in a single file that holds it."""
        return self.prefix if self.open_clip else f"{self.prefix}text_model."

    @property
    def padding(self) -> str:
        """The token that it was trained with as padding."""
        return "!" if self.open_clip else END


@dataclass(frozen=True)
class PublicModel:
    """One published model, as its diffusers folder describes it, without its weights."""

    title: str
    architecture: str
    """Its entry in ``registry.ARCHITECTURES``."""
    unet: Mapping[str, Any]
    unet_parameters: int
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    text_encoder_2: Mapping[str, Any] | None
    scheduler: Mapping[str, Any]

    @property
    def adapter(self) -> Architecture:
        """The architecture itself."""
        return ARCHITECTURES[self.architecture]

    @property
    def pipeline(self) -> str:
        """The class of its diffusers pipeline."""
        return self.adapter.pipeline

    @property
    def factor(self) -> int:
        """Pixels per latent."""
        return pixels_per_latent(self.vae)

    def with_prediction(self, prediction_type: str, zero_snr: bool) -> PublicModel:
        """The same model trained to predict something else, or on another noise schedule."""
        scheduler = dict(self.scheduler) | {"prediction_type": prediction_type}
        if zero_snr:
            scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            if scheduler["_class_name"] == "PNDMScheduler":  # it cannot rescale
                scheduler["_class_name"] = "DDIMScheduler"
        return replace(self, scheduler=scheduler, unet=self.adapter.unet_predicting(self.unet, prediction_type))

    def with_small_text_encoders(self) -> PublicModel:
        """Text encoders of two layers and the same widths."""
        second = None if self.text_encoder_2 is None else dict(self.text_encoder_2) | {"num_hidden_layers": 2}
        return replace(self, text_encoder=dict(self.text_encoder) | {"num_hidden_layers": 2}, text_encoder_2=second)


class Architecture:
    """The adapter of one architecture. ``config`` is always that of its denoiser, as in ``unet/config.json``."""

    name: str
    title: str
    """As messages call it."""
    pipeline: str
    """The class of its diffusers pipeline."""
    denoiser: str
    """The class of its denoiser."""
    text_encoders: tuple[TextEncoder, ...]
    models: Mapping[str, PublicModel]
    """Published models, and a tiny one of the same kind for tests."""
    index: Mapping[str, Any]
    """What else ``model_index.json`` says of every model."""
    text_length: int
    """L, the tokens of an embedded prompt."""
    usual_prediction: str | None = "epsilon"
    """What a model predicts that does not say it; None: nobody can tell."""

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether this is the configuration of such a denoiser."""
        raise NotImplementedError

    def folder_refusal(self, index: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
        """Why a folder with this pipeline's class cannot be edited, from its ``model_index.json``; None: it can."""
        raise NotImplementedError

    def unet_predicting(self, config: Mapping[str, Any], prediction_type: str) -> Mapping[str, Any]:
        """The configuration of the public model that predicts this."""
        return config

    def block_of(self, name: str) -> str | None:
        """The block that a parameter belongs to; None: to none."""
        raise NotImplementedError

    def layer_of(self, name: str) -> str | None:
        """The layer whose gradients arrive together with this parameter's; None: it is in none."""
        raise NotImplementedError

    def in_scope(self, module_name: str, scope: str) -> bool:
        """Whether a scope other than "full" trains the weights of this linear layer or convolution."""
        raise NotImplementedError

    def is_attention_projection(self, module_name: str) -> bool:
        """Whether this is a query, key, value or output projection of the denoiser's attentions."""
        raise NotImplementedError

    def latent_shape(self, config: Mapping[str, Any], side: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of one sample's latents; ``side``: other than the model's own."""
        raise NotImplementedError

    def text_width(self, config: Mapping[str, Any]) -> int:
        """D, the width of the token embeddings that it attends to."""
        raise NotImplementedError

    def pooled_width(self, config: Mapping[str, Any]) -> int | None:
        """P, the width of the pooled embedding; None: it takes none."""
        return None

    def fixed_inputs(self, pixels: int, device: torch.device | str) -> dict[str, Tensor]:
        """Inputs that are the same for every sample of a run with images of this side, (1, ...) each."""
        return {}

    def call_arguments(self, embeds: PromptEmbeds, fixed: Mapping[str, Tensor], batch: int) -> dict[str, Any]:
        """Keyword arguments of the denoiser's forward pass beside latents and timesteps."""
        raise NotImplementedError

    def example_inputs(
        self, config: Mapping[str, Any], batch: int, side: int, tokens: int, dtype: torch.dtype, device: str
    ) -> dict[str, Any]:
        """Empty inputs of the denoiser's forward pass by their names, for latents and prompts of these sizes."""
        raise NotImplementedError

    def build_denoiser(self, config: Mapping[str, Any]) -> nn.Module:
        """The denoiser with fresh weights, on the current default device."""
        raise NotImplementedError

    def pipeline_arguments(self, cond: PromptEmbeds, uncond: PromptEmbeds) -> dict[str, Any]:
        """Keyword arguments with which its diffusers pipeline takes embedded prompts."""
        raise NotImplementedError


def pixels_per_latent(vae: Mapping[str, Any]) -> int:
    """How much smaller than an image its latents are on each side, by the VAE's configuration; {}: as usual."""
    return int(2 ** (len(vae.get("block_out_channels", range(4))) - 1))


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Whose denoiser this configuration describes.

    Raises:
        ValueError: nobody's.
    """
    for architecture in ARCHITECTURES.values():
        if architecture.fits(config):
            return architecture
    raise ValueError(f"no known architecture has such a denoiser: {config.get('_class_name')}")
