"""Models as users have them: folders, hub ids and single files, on tiny models with the structure of SD 1, 2 and XL."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from fastunlearn import cli
from fastunlearn.config import ModelConfig
from fastunlearn.errors import UserError
from fastunlearn.models.backbone import build_backbone
from fastunlearn.models.checks import check_hub_cache
from fastunlearn.models.formats.completeness import component_shapes
from fastunlearn.models.formats.folder_configs import PUBLIC_MODELS, write_tokenizer
from fastunlearn.models.formats.headers import Entry, read_header
from fastunlearn.models.formats.original_layout import original_tensors
from fastunlearn.models.formats.random_weights import write_file, write_folder
from fastunlearn.models.formats.single_file import identify, read_single_file
from fastunlearn.models.loading import load_pipeline, stored_dtype
from fastunlearn.models.pipeline import ddim_scheduler

KINDS = ("tiny-sdxl", "tiny-sd15", "tiny-sd21")
SHARED = "conditioner.embedders."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each kind a folder and a file with the same random weights in fp32."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        write_folder(PUBLIC_MODELS[kind], root / kind, torch.float32, seed=3)
        write_file(PUBLIC_MODELS[kind], root / f"{kind}.safetensors", torch.float32, seed=3)
    return root


def options(path: object, **fields: object) -> ModelConfig:
    return ModelConfig.model_validate({"pretrained_model_name_or_path": str(path), **fields})


@pytest.mark.parametrize(("kind", "theirs"), [("sdxl", "xl_base"), ("sd15", "v1"), ("sd21", "v2")])
def test_diffusers_calls_a_single_file_the_same(kind: str, theirs: str) -> None:
    """Ours is told from the header alone, and says what else a file is; the published models must not differ."""
    model = PUBLIC_MODELS[kind]
    shapes = {original.name: original.shape for original in original_tensors(model, component_shapes(model))}
    assert infer_diffusers_model_type({name: torch.empty(s, device="meta") for name, s in shapes.items()}) == theirs
    assert identify({name: Entry("F16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()}) == kind


def test_the_vocabulary_is_clips(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "!")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("a", padding="max_length").input_ids == [49406, 320, 49407] + 74 * [0]


def test_each_text_encoder_has_the_padding_that_it_was_trained_with(models: Path) -> None:
    padding = {"tiny-sdxl": {"tokenizer": 49407, "tokenizer_2": 0}, "tiny-sd15": {"tokenizer": 49407}}
    for kind, expected in (padding | {"tiny-sd21": {"tokenizer": 0}}).items():
        found = {place.name: CLIPTokenizer.from_pretrained(place) for place in (models / kind).glob("tokenizer*")}
        assert {name: tokenizer.pad_token_id for name, tokenizer in found.items()} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_gives_the_pipeline_that_the_folder_gives(kind: str, models: Path) -> None:
    folder, file = (load_pipeline(models / name) for name in (kind, f"{kind}.safetensors"))
    assert type(folder) is type(file) and dict(folder.scheduler.config) == dict(file.scheduler.config)
    assert type(folder.scheduler) is type(file.scheduler)
    for name, part in folder.components.items():
        other = getattr(file, name)
        if isinstance(part, nn.Module):
            weights, others = part.state_dict(), other.state_dict()
            assert list(weights) == list(others)
            assert not [key for key in weights if not torch.equal(weights[key], others[key])], name
        elif name.startswith("tokenizer"):
            text = ["a cat, Van Gogh style!"]
            assert part(text, padding="max_length").input_ids == other(text, padding="max_length").input_ids
    assert folder.config.get("force_zeros_for_empty_prompt") == file.config.get("force_zeros_for_empty_prompt")


# A few tensors by hand: (original name, component, diffusers' name)
NAMES = [
    ("model.diffusion_model.input_blocks.1.0.in_layers.2.weight", "unet", "down_blocks.0.resnets.0.conv1.weight"),
    ("model.diffusion_model.input_blocks.3.0.op.bias", "unet", "down_blocks.0.downsamplers.0.conv.bias"),
    ("model.diffusion_model.middle_block.2.emb_layers.1.weight", "unet", "mid_block.resnets.1.time_emb_proj.weight"),
    ("model.diffusion_model.output_blocks.5.0.out_layers.0.bias", "unet", "up_blocks.1.resnets.2.norm2.bias"),
    ("first_stage_model.decoder.up.3.block.1.conv2.weight", "vae", "decoder.up_blocks.0.resnets.1.conv2.weight"),
    ("first_stage_model.encoder.mid.block_2.norm1.weight", "vae", "encoder.mid_block.resnets.1.norm1.weight"),
]


@pytest.mark.parametrize(("original", "component", "name"), NAMES)
def test_the_original_layout_has_its_names(original: str, component: str, name: str, models: Path) -> None:
    for kind in KINDS:
        folder = load_file(models / kind / component / "diffusion_pytorch_model.safetensors")
        assert torch.equal(load_file(models / f"{kind}.safetensors")[original], folder[name])


def guided_step(kind: str, folder: Path, prompt: str, latents: Tensor, side: int, steps: int, scale: float) -> Tensor:
    """The first step of a trajectory as training makes it, with DDIM's formulas written out."""
    pipeline = load_pipeline(folder)
    backbone = build_backbone(pipeline, ["", prompt], side, torch.device("cpu"), torch.float32)
    assert backbone.sample_shape == tuple(latents.shape[1:])
    time = 1 + (steps - 1) * (1000 // steps)
    times = backbone.noise.expand(time, len(latents))
    uncond, cond = (backbone.predict(backbone.unet, latents, times, backbone.embeds.select([row])) for row in (0, 1))
    out = uncond + scale * (cond - uncond)
    now, after = (level.double()[0] for level in backbone.noise.levels(times, steps))
    noise, clean = out, (latents - (1 - now).sqrt() * out) / now.sqrt()
    if backbone.noise.prediction_type == "v_prediction":
        clean, noise = now.sqrt() * latents - (1 - now).sqrt() * out, now.sqrt() * out + (1 - now).sqrt() * latents
    assert (backbone.noise.prediction_type == "v_prediction") == (kind == "tiny-sd21")
    return after.sqrt() * clean + (1 - after).sqrt() * noise


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_denoising_step_is_the_pipelines_own(kind: str, models: Path) -> None:
    # Loaded by diffusers itself, at another size than the model's, on which SDXL's time ids depend.
    pipeline = DiffusionPipeline.from_pretrained(models / kind)
    pipeline.scheduler = ddim_scheduler(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    latents, side, seen = torch.randn(1, 4, 16, 16), 128, []

    def note(_: object, step: int, time: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(values["latents"].clone())
        return values

    pipeline(
        "a cat in van gogh style", height=side, width=side, num_inference_steps=4, guidance_scale=3.0,
        latents=latents.clone(), output_type="latent", callback_on_step_end=note,
    )  # fmt: skip
    step = guided_step(kind, models / kind, "a cat in van gogh style", latents, side, steps=4, scale=3.0)
    assert (seen[0] - latents).abs().max() > 0.1
    assert torch.allclose(step.float(), seen[0], atol=2e-5), (step - seen[0]).abs().max()


@torch.no_grad()
def test_sdxl_is_told_size_corner_and_target(models: Path) -> None:
    pipeline = load_pipeline(models / "tiny-sdxl")
    theirs = pipeline._get_add_time_ids((128, 128), (0, 0), (128, 128), torch.float32, 48)
    backbone = build_backbone(pipeline, [""], 128, torch.device("cpu"), torch.float32)
    assert torch.equal(backbone.fixed_inputs["time_ids"], theirs)


def with_markers(models: Path, place: Path, *markers: str, kind: str = "tiny-sdxl") -> Path:
    tensors = load_file(models / f"{kind}.safetensors") | {name: torch.tensor([]) for name in markers}
    save_file(tensors, place)
    return place


def test_markers_of_v_prediction_are_seen(models: Path, tmp_path: Path) -> None:
    plain = load_pipeline(with_markers(models, tmp_path / "plain.safetensors")).scheduler
    assert plain.config["prediction_type"] == "epsilon" and plain.alphas_cumprod[-1] > 1e-3
    v_only = load_pipeline(with_markers(models, tmp_path / "v.safetensors", "v_pred")).scheduler
    assert v_only.config["prediction_type"] == "v_prediction" and v_only.alphas_cumprod[-1] > 1e-3
    both = load_pipeline(with_markers(models, tmp_path / "both.safetensors", "v_pred", "ztsnr"))
    assert both.scheduler.config["prediction_type"] == "v_prediction"
    sampler = ddim_scheduler(both)
    assert sampler.alphas_cumprod[-1] < 1e-7  # nothing but noise at the last step
    sampler.set_timesteps(50)
    assert sampler.timesteps[0] == 999
    stated = options("x", prediction_type="epsilon")
    assert load_pipeline(tmp_path / "v.safetensors", options=stated).scheduler.config["prediction_type"] == "epsilon"


def test_sd2_must_say_what_it_predicts(models: Path, tmp_path: Path) -> None:
    said = read_single_file(models / "tiny-sd21.safetensors")
    assert said.said_prediction == "v_prediction"  # in the metadata that the writer puts in
    silent = read_single_file(with_markers(models, tmp_path / "silent.safetensors", kind="tiny-sd21"))
    with pytest.raises(UserError, match=r"model.prediction_type: .*silent.* state 'v_prediction'"):
        silent.public_model(options("x"))
    assert silent.public_model(options("x", prediction_type="v_prediction")).unet["sample_size"] == 8
    full = PUBLIC_MODELS["sd21"]
    sizes = [full.with_prediction(name, False).unet["sample_size"] for name in ("v_prediction", "epsilon")]
    assert sizes == [96, 64]


@pytest.mark.parametrize("kind", ["tiny-sdxl", "tiny-sd15"])
def test_a_folder_can_be_stated_to_predict_v(kind: str, models: Path) -> None:
    stated = options(models / kind, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipeline = load_pipeline(models / kind, options=stated)
    assert pipeline.scheduler.config["prediction_type"] == "v_prediction"
    assert ddim_scheduler(pipeline).alphas_cumprod[-1] < 1e-7
    assert type(pipeline.scheduler) is (EulerDiscreteScheduler if kind == "tiny-sdxl" else DDIMScheduler)


def header(**shapes: tuple[int, ...]) -> dict[str, Entry]:
    return {name.replace("__", "."): Entry("F16", shape, 0) for name, shape in shapes.items()}


UNET = "model__diffusion_model__input_blocks__0__0__weight"
VAE = {"first_stage_model__decoder__conv_in__weight": (4, 4, 3, 3)}
CLIP_L_1 = {"cond_stage_model__transformer__text_model__final_layer_norm__weight": (768,)}
BOTH = {
    "conditioner__embedders__0__transformer__text_model__final_layer_norm__weight": (768,),
    "conditioner__embedders__1__model__ln_final__weight": (1280,),
}
# What is not a whole model that can be edited -> words by which it is called.
OTHER_FILES = {
    "refiner": (
        header(**{UNET: (384, 4, 3, 3), "conditioner__embedders__0__model__ln_final__weight": (1280,)}),
        "refiner",
    ),
    "inpainting": (header(**{UNET: (320, 9, 3, 3)}, **CLIP_L_1, **VAE), "an inpainting model"),
    "xl inpainting": (header(**{UNET: (320, 9, 3, 3)}, **BOTH, **VAE), "an inpainting model"),
    "pix2pix": (header(**{UNET: (320, 8, 3, 3)}, **CLIP_L_1), "InstructPix2Pix"),
    "sd3": (header(model__diffusion_model__joint_blocks__0__x_block__attn__qkv__weight=(9, 9)), "SD3"),
    "flux": (header(double_blocks__0__img_attn__qkv__weight=(9, 9)), "FLUX"),
    "pixart": (header(adaln_single__linear__weight=(9, 9)), "PixArt"),
    "lora": (header(**{"lora_unet_down_blocks_0__lora_up__weight": (8, 4)}), "a LoRA"),
    "peft lora": (header(**{"unet__conv_in__lora_A__weight": (8, 4)}), "a LoRA"),
    "vae": (header(decoder__conv_in__weight=(4, 4, 3, 3), encoder__conv_in__weight=(4, 3, 3, 3)), "a VAE"),
    "ldm vae": (header(**VAE), "a VAE"),
    "embedding": (header(emb_params=(4, 768)), "an embedding"),
    "xl embedding": (header(clip_g=(4, 1280), clip_l=(4, 768)), "an embedding"),
    "unet": (header(conv_in__weight=(4, 4, 3, 3), down_blocks__0__resnets__0__conv1__bias=(4,)), "a bare U-Net"),
    "ldm unet": (header(**{UNET.removeprefix("model__diffusion_model__"): (320, 4, 3, 3)}), "a bare U-Net"),
    "no text": (header(**{UNET: (320, 4, 3, 3)}, **VAE), "without its text encoders"),
    "one text": (header(**{UNET: (320, 4, 3, 3)}, **dict([next(iter(BOTH.items()))])), "one of its two"),
    "old text": (
        header(**{UNET: (320, 4, 3, 3), "cond_stage_model__transformer__final_layer_norm__weight": (768,)}),
        "old layout",
    ),
    "controlnet": (header(control_model__time_embed__0__weight=(9, 9)), "a ControlNet"),
    "distilled": (header(**{UNET: (320, 4, 3, 3)}, **BOTH, **VAE), "11,520 parameters instead of 2,567,463,684"),
    "unknown": (header(something=(3, 3, 3)), "no model that is known"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_called_by_name(name: str) -> None:
    entries, words = OTHER_FILES[name]
    assert words in identify(entries)


@pytest.mark.parametrize("kind", [*KINDS, "sdxl", "sd15", "sd21"])
def test_whole_models_are_told_apart_by_their_headers(kind: str, models: Path) -> None:
    if kind in KINDS:
        entries, _ = read_header(models / f"{kind}.safetensors")
    else:  # what decides: first convolution, parameters, text encoders
        conv, parameters = (320, 4, 3, 3), PUBLIC_MODELS[kind].unet_parameters
        text = {"sdxl": BOTH, "sd15": CLIP_L_1, "sd21": {"cond_stage_model__model__ln_final__weight": (1024,)}}[kind]
        rest = {"model__diffusion_model__rest": (parameters - 11520,)}
        entries = header(**{UNET: conv}, **rest, **text, **VAE)
    assert identify(entries) == kind


def fake_file(path: Path, entries: dict[str, Entry]) -> Path:
    """A well-formed safetensors file with these shapes and no values worth reading."""
    content, end = {}, 0
    for name, entry in entries.items():
        start, end = end, end + 2 * entry.elements
        content[name] = {"dtype": "F16", "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(content).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize("name", ["refiner", "flux", "lora"])
def test_the_command_line_refuses_other_files(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries, words = OTHER_FILES[name]
    file = fake_file(tmp_path / "model.safetensors", entries)
    argv = ["--concepts", "cat", "--keep", "dog", f"--model.pretrained_model_name_or_path={file}"]
    assert cli.main([command, *argv, f"--output_dir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and "allowed are whole models of SD 1.x" in error


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    with pytest.raises(UserError, match="pickled weights are not read"):
        read_single_file(tmp_path / "model.ckpt")


def test_a_file_that_lacks_a_tensor_is_refused(models: Path, tmp_path: Path) -> None:
    tensors = load_file(models / "tiny-sd15.safetensors")
    del tensors["cond_stage_model.transformer.text_model.final_layer_norm.weight"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 tensors of its text_encoder, such as .*final_layer_norm.weight"):
        load_pipeline(tmp_path / "less.safetensors")


def test_the_unet_can_stay_as_it_is_stored(models: Path, tmp_path: Path) -> None:
    write_folder(PUBLIC_MODELS["tiny-sd15"], tmp_path / "half", torch.float16, seed=1)
    write_file(PUBLIC_MODELS["tiny-sd15"], tmp_path / "half.safetensors", torch.float16, seed=1)
    for place in (tmp_path / "half", tmp_path / "half.safetensors"):
        model = options(place)
        assert stored_dtype(model) == torch.float16
        pipeline = load_pipeline(place, options=model, unet_dtype=stored_dtype(model))
        assert pipeline.unet.dtype == torch.float16
        assert pipeline.text_encoder.dtype == torch.float32 and pipeline.vae.dtype == torch.float32


def hub_cache(root: Path, name: str, content: Path, revision: str = "main") -> Path:
    """The hub's cache with one model, as a download leaves it."""
    folder = root / ("models--" + name.replace("/", "--"))
    commit = "0" * 39 + str(len(revision))
    shutil.copytree(content, folder / "snapshots" / commit)
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    return root


def test_a_hub_model_from_the_cache(models: Path, tmp_path: Path) -> None:
    cache = hub_cache(tmp_path, "someone/tiny", models / "tiny-sd15", "v2")
    known = {"cache_dir": str(cache), "local_files_only": True, "revision": "v2"}
    pipeline = load_pipeline("someone/tiny", options=options("someone/tiny", **known))
    assert torch.equal(pipeline.unet.conv_in.weight, load_pipeline(models / "tiny-sd15").unet.conv_in.weight)
    check_hub_cache(options("someone/tiny", **known))
    for wrong in ({"revision": "v3"}, {"cache_dir": str(tmp_path / "none")}):
        with pytest.raises(UserError, match=r"someone/tiny.* is not in .* model.local_files_only is set"):
            check_hub_cache(options("someone/tiny", **{**known, **wrong}))
    with pytest.raises(UserError, match=r"cannot read model_index.json of 'someone/tiny'"):
        load_pipeline("someone/tiny", options=options("someone/tiny", **{**known, "revision": "v3"}))


def test_a_variant_from_the_cache(models: Path, tmp_path: Path) -> None:
    cache = hub_cache(tmp_path, "someone/tiny", models / "tiny-sd15")
    for file in list(cache.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    known = {"cache_dir": str(cache), "local_files_only": True}
    load_pipeline("someone/tiny", options=options("someone/tiny", variant="fp16", **known))
    assert stored_dtype(options("someone/tiny", variant="fp16", **known)) == torch.float32, "what the files hold"
    with pytest.raises(UserError, match="only holds the variant 'fp16'; set it"):
        load_pipeline("someone/tiny", options=options("someone/tiny", **known))


def test_a_hub_models_dtype_is_that_of_its_files(tmp_path: Path) -> None:
    write_folder(PUBLIC_MODELS["tiny-sd15"], tmp_path / "half", torch.float16, seed=1)
    cache = hub_cache(tmp_path / "cache", "someone/half", tmp_path / "half")
    known = {"cache_dir": str(cache), "local_files_only": True}
    assert stored_dtype(options("someone/half", **known)) == torch.float16


def test_another_kind_from_the_hub_is_refused_before_its_weights(tmp_path: Path) -> None:
    (tmp_path / "source" / "unet").mkdir(parents=True)  # configurations, no weights
    index = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]}
    (tmp_path / "source" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "source" / "unet" / "config.json").write_text("{}")
    cache = hub_cache(tmp_path / "hub", "someone/refiner", tmp_path / "source")
    model = options("someone/refiner", cache_dir=str(cache), local_files_only=True)
    for refuse in (check_hub_cache, lambda model: load_pipeline("someone/refiner", options=model)):
        with pytest.raises(UserError, match="'someone/refiner' is SDXL's refiner"):
            refuse(model)


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_another_process_from_the_hub_is_refused_before_its_weights(kind: str, models: Path, tmp_path: Path) -> None:
    """By the scheduler's own file: it is fetched first, and nothing but configurations is."""
    source = Path(shutil.copytree(models / "tiny-sd15", tmp_path / "source"))
    config = source / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": kind}))
    fetched: list[str] = []

    def fetch(name: str, path: str, **_: object) -> str:
        fetched.append(path)
        target = tmp_path / "snapshot" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copyfile(source / path, target))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.hf_hub_download", fetch)
        with pytest.raises(UserError, match=f"'someone/other' cannot be edited: its scheduler is a {kind}"):
            load_pipeline("someone/other")
    assert fetched and all(path.endswith(".json") for path in fetched)


def test_another_vae_takes_the_place_of_the_models(models: Path, tmp_path: Path) -> None:
    write_folder(PUBLIC_MODELS["tiny-sdxl"], tmp_path / "other", torch.float32, seed=4)
    write_file(PUBLIC_MODELS["tiny-sdxl"], tmp_path / "other.safetensors", torch.float32, seed=4)
    whole = load_file(tmp_path / "other.safetensors")
    prefix = "first_stage_model."
    bare = {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
    save_file(bare, tmp_path / "original.safetensors")
    weights = tmp_path / "other" / "vae" / "diffusion_pytorch_model.safetensors"
    expected = AutoencoderKL.from_pretrained(tmp_path / "other" / "vae").state_dict()
    places = [tmp_path / "other", tmp_path / "other" / "vae", tmp_path / "original.safetensors", weights]
    for base in ("tiny-sdxl", "tiny-sdxl.safetensors"):
        own = load_pipeline(models / base)
        for place in places:
            pipeline = load_pipeline(models / base, options=options(models / base, vae=str(place)))
            found = pipeline.vae.state_dict()
            assert all(torch.equal(found[name], expected[name]) for name in expected), place
            assert pipeline.vae.config["scaling_factor"] == own.vae.config["scaling_factor"] == 0.13025
            assert not torch.equal(own.vae.state_dict()["encoder.conv_in.weight"], expected["encoder.conv_in.weight"])
            assert torch.equal(own.unet.conv_in.weight, pipeline.unet.conv_in.weight)


def test_a_file_without_a_vae_takes_the_given_one(models: Path, tmp_path: Path) -> None:
    tensors = load_file(models / "tiny-sdxl.safetensors")
    file = tmp_path / "no-vae.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage_model.")}, file)
    assert not read_single_file(file).has_vae
    pipeline = load_pipeline(file, options=options(file, vae=str(models / "tiny-sdxl")))
    expected = load_pipeline(models / "tiny-sdxl").vae.encoder.conv_in.weight
    assert torch.equal(pipeline.vae.encoder.conv_in.weight, expected)
