"""Adapters: who is recognised by what, what each gives its denoiser, and how names and headers are read."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastunlearn.models.architectures.base import architecture_of
from fastunlearn.models.architectures.prompt_embeds import PromptEmbeds
from fastunlearn.models.architectures.sd1 import SD1
from fastunlearn.models.architectures.unet2d import UNet2DArchitecture
from fastunlearn.models.formats.folder_configs import PUBLIC_MODELS
from fastunlearn.models.parameter_names import (
    SCOPES,
    attention_projections,
    block_of,
    count_trained,
    layer_of,
    text_projections,
    trainable_names,
)
from fastunlearn.registry import ARCHITECTURES

TINY = [name for name in PUBLIC_MODELS if name.startswith("tiny-")]


def test_adapters_need_no_torch() -> None:
    code = "from fastunlearn.registry import ARCHITECTURES; list(ARCHITECTURES.values()); import sys"
    modules = "fastunlearn.models.parameter_names, fastunlearn.models.formats.single_file"
    subprocess.run([sys.executable, "-c", f"{code}, {modules}; assert 'torch' not in sys.modules"], check=True)


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_each_model_is_known_by_its_denoiser(name: str) -> None:
    model = PUBLIC_MODELS[name]
    assert architecture_of(model.unet) is model.adapter is ARCHITECTURES[model.architecture]
    assert [a.name for a in ARCHITECTURES.values() if a.fits(model.unet)] == [model.architecture]


def test_another_denoiser_is_nobodys() -> None:
    with pytest.raises(ValueError, match="SD3Transformer2DModel"):
        architecture_of({"_class_name": "SD3Transformer2DModel"})


@pytest.mark.parametrize("name", TINY)
def test_the_call_has_what_the_denoiser_takes(name: str) -> None:
    """Example inputs and a run's own have the same names and shapes, and the denoiser runs on them."""
    model = PUBLIC_MODELS[name]
    adapter, config = model.adapter, dict(model.unet)
    unet = adapter.build_denoiser(config)
    example = adapter.example_inputs(config, 2, 8, 77, torch.float32, "cpu")
    width = adapter.pooled_width(config)
    embeds = PromptEmbeds(
        torch.randn(2, 77, adapter.text_width(config)), None if width is None else torch.randn(2, width)
    )
    arguments = adapter.call_arguments(embeds, adapter.fixed_inputs(64, "cpu"), batch=2)
    shapes = tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), arguments)
    expected = tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), example)
    sample = expected.pop("sample")
    assert sample == (2, *adapter.latent_shape(config)) and expected.pop("timestep") == (2,)
    assert shapes == expected | {"return_dict": False}
    (out,) = unet(torch.randn(sample), torch.tensor([1, 999]), **arguments)
    assert out.shape == sample


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_is_counted_from_headers_as_from_the_model(name: str, scope: str) -> None:
    model = PUBLIC_MODELS[name]
    with torch.device("meta"):
        unet = model.adapter.build_denoiser(model.unet)
    shapes = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
    wanted = sum(unet.get_parameter(key).numel() for key in trainable_names(unet, scope))
    assert count_trained(shapes, scope, model.unet) == wanted > 0


def test_projections_of_the_text_are_keys_and_values() -> None:
    model = PUBLIC_MODELS["tiny-sdxl"]
    unet: Any = model.adapter.build_denoiser(model.unet)
    names = {module: name for name, module in unet.named_modules()}
    found = [names[module] for module in text_projections(unet)]
    assert [f"{name}.weight" for name in found] == trainable_names(unet, "attn2_kv")
    assert all(module.in_features == model.adapter.text_width(unet.config) for module in text_projections(unet))
    every = {names[module].rpartition(".attn")[2] for module in attention_projections(unet)}
    assert every == {f"{attention}.{part}" for attention in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")}


def test_a_new_architecture_is_a_file_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy one: its denoiser is recognised, its blocks have their names, its scopes and its call are its own."""

    class Toy(UNet2DArchitecture):
        name, title, pipeline, denoiser = "toy", "Toy", "ToyPipeline", "ToyTransformer"
        text_encoders, models, index = (), {}, {}

        def fits(self, config: Any) -> bool:
            return config.get("_class_name") == self.denoiser

        def block_of(self, name: str) -> str | None:
            return ".".join(name.split(".")[:2]) if name.startswith("transformer_blocks.") else None

        layer_of = block_of

        def in_scope(self, module_name: str, scope: str) -> bool:
            return scope == "attn2" and module_name.endswith("add_k")

    class ToyTransformer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"_class_name": "ToyTransformer"}
            self.transformer_blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"add_k": torch.nn.Linear(80, 80)})])

    monkeypatch.setattr(sys.modules[__name__], "TOY", Toy(), raising=False)
    monkeypatch.setitem(ARCHITECTURES.entries, "toy", f"{__name__}:TOY")
    toy = ToyTransformer()
    assert architecture_of(toy.config).name == "toy"
    assert architecture_of({"_class_name": "UNet2DConditionModel"}) is SD1
    names = trainable_names(toy, "attn2")
    assert names == ["transformer_blocks.0.add_k.weight", "transformer_blocks.0.add_k.bias"]
    assert block_of(names[0]) == layer_of(names[0], 6400) == "transformer_blocks.0"
    assert block_of("down_blocks.1.attentions.0.norm.weight") == "down_blocks.1.attentions.0"
