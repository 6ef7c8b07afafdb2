"""Checks of the disk: damaged or missing models, output folders that must not be touched, space."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from safetensors.numpy import save_file

from fastunlearn import cli
from fastunlearn.config import Config, load_config
from fastunlearn.errors import UserError
from fastunlearn.models import checks
from fastunlearn.models.architectures.unet2d import NOISE
from fastunlearn.models.parameter_names import trainable_names
from fastunlearn.schema.fields import Scope
from fastunlearn.training import preflight
from fastunlearn_kernels.common import backend

UNET = "unet/diffusion_pytorch_model.safetensors"


def write_safetensors(path: Path, elements: int = 64) -> None:
    """A well-formed file with one fp32 tensor of zeros."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * elements))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like an SD pipeline: one small tensor in every component."""
    folder = tmp_path / "models" / "tiny-sd"
    for name in (UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        write_safetensors(folder / name)
        (folder / name).with_name("config.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(NOISE))
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }  # fmt: skip
    index = {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None], **parts}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def config(model: object, output: object = "outputs/none", *arguments: str) -> Config:
    return load_config(
        None,
        ["--concepts", "neon style", f"--pretrained_model_name_or_path={model}", f"--output_dir={output}", *arguments],
    )


def refusal(check: Callable[[Config], object], cfg: Config) -> str:
    with pytest.raises(UserError) as caught:
        check(cfg)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def set_class(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))


def set_unet(**fields: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "unet" / "config.json").write_text(json.dumps(fields))


def set_index(**fields: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | fields))

    return change


def as_sdxl(**fields: object) -> Callable[[Path], object]:
    both: dict[str, object] = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    return set_index(_class_name="StableDiffusionXLPipeline", **both | fields)


def truncate(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-1])


def extend(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes() + b"\0")


def rename_to_variant(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")


def only_pickle(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")


# what happens to the model folder -> words that the one line must hold
DAMAGE: list[tuple[Callable[[Path], object], tuple[str, ...]]] = [
    (set_class("StableDiffusionInpaintPipeline"), ("StableDiffusionInpaintPipeline", "StableDiffusionXLPipeline")),
    (set_class("FluxPipeline"), ("FLUX", "FluxPipeline", "allowed", "SDXL-base")),
    (set_class("StableDiffusion3Pipeline"), ("is SD3", "StableDiffusion3Pipeline")),
    (set_class("PixArtSigmaPipeline"), ("is PixArt", "PixArtSigmaPipeline")),
    (set_class("StableDiffusionXLImg2ImgPipeline"), ("SDXL's refiner", "StableDiffusionXLImg2ImgPipeline")),
    (set_class("WuerstchenCombinedPipeline"), ("is a WuerstchenCombinedPipeline",)),
    (set_unet(in_channels=9), ("an inpainting model", "9 channels")),
    (set_unet(in_channels=8), ("InstructPix2Pix", "8 channels")),
    (set_unet(addition_embed_type="text_image"), ("added condition 'text_image'",)),
    (set_unet(time_cond_proj_dim=256), ("a latent consistency model",)),
    (set_unet(_class_name="UNetFlatConditionModel"), ("UNetFlatConditionModel",)),
    (set_index(text_encoder=[None, None]), ("has no text encoder",)),
    (as_sdxl(text_encoder=[None, None]), ("SDXL's refiner",)),
    (as_sdxl(requires_aesthetics_score=True), ("SDXL's refiner", "aesthetic")),
    (as_sdxl(text_encoder_2=[None, None]), ("no second text encoder",)),
    (lambda folder: (folder / "unet" / "config.json").write_text("{"), ("unet/config.json", "damaged")),
    (lambda folder: (folder / "model_index.json").unlink(), ("no model_index.json",)),
    (lambda folder: (folder / "model_index.json").write_text("{"), ("model_index.json", "damaged")),
    (lambda folder: (folder / "model_index.json").write_text("[]"), ("model_index.json", "damaged")),
    (lambda folder: shutil.rmtree(folder / "vae"), ("vae", "missing")),
    (truncate, (UNET, "corrupt", "declares")),
    (extend, (UNET, "corrupt", "declares")),
    (lambda folder: (folder / UNET).write_bytes(b""), (UNET, "corrupt")),
    (lambda folder: (folder / UNET).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), (UNET, "corrupt")),
    (lambda folder: (folder / UNET).write_bytes(struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc"), (UNET, "corrupt")),
    (lambda folder: (folder / UNET).write_bytes(struct.pack("<Q", 4) + b"[42]"), (UNET, "corrupt")),
    (lambda folder: (folder / UNET).write_bytes(struct.pack("<Q", 7) + b'{"a":1}'), (UNET, "corrupt")),
    (only_pickle, ("unet", "no *.safetensors")),
    (rename_to_variant, ("model.variant", "'fp16'")),
]


def test_a_good_model_passes(model: Path) -> None:
    assert checks.check_model(config(model)) == model


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_a_damaged_model_is_refused_by_name(
    damage: Callable[[Path], object], words: tuple[str, ...], model: Path
) -> None:
    damage(model)
    message = refusal(checks.check_model, config(model))
    assert not [word for word in words if word not in message], message


def test_a_variant_is_found_or_named(model: Path) -> None:
    assert "'bf16'" in refusal(checks.check_model, config(model, "out", "--variant", "bf16"))
    rename_to_variant(model)  # the other components have no such variant, and diffusers then takes their plain files
    assert checks.check_model(config(model, "out", "--variant", "fp16")) == model


def test_names_that_are_no_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent.parent)
    assert "HF_HUB_OFFLINE is set" in refusal(checks.check_model, config("org/some-model"))  # a hub id
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert checks.check_model(config("org/some-model")) is None
    assert "nearest: tiny-sd" in refusal(checks.check_model, config("models/tiny-ds"))
    assert "nearest: tiny-sd" in refusal(checks.check_model, config(f"{model}x"))
    assert "nearest: minicanvas" in refusal(checks.check_model, config("minicanva"))
    assert "does not exist" in refusal(checks.check_model, config("/no/such/folder"))
    assert "no model that is known" in refusal(checks.check_model, config(model / UNET))  # one file, but of what?


def write_vae(folder: Path, **fields: object) -> Path:
    write_safetensors(folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **fields}))
    return folder


def test_another_vae_must_be_one_for_this_model(model: Path, tmp_path: Path) -> None:
    write_vae(model / "vae", scaling_factor=0.18215, latent_channels=4)
    good = write_vae(tmp_path / "good", scaling_factor=0.18215, latent_channels=4)
    checks.check_model(config(model, "out", "--model.vae", str(good)))
    checks.check_model(config(model, "out", "--model.vae", str(model)))  # that of a whole pipeline
    sdxl = write_vae(tmp_path / "sdxl", scaling_factor=0.13025, latent_channels=4)
    damaged = write_vae(tmp_path / "damaged", scaling_factor=0.18215)
    (damaged / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 20)
    wrong = write_vae(tmp_path / "wrong", _class_name="AutoencoderTiny")
    for place, words in (
        (sdxl, ("model.vae", "scaling_factor 0.13025", "0.18215")),
        (damaged, ("corrupt",)),
        (wrong, ("model.vae", "AutoencoderTiny")),
        (model / "text_encoder", ("model.vae", "no VAE's config.json")),
        (tmp_path / "goof", ("model.vae", "does not exist", "nearest: good")),
        (model / UNET, ("model.vae", "is no VAE")),
    ):
        message = refusal(checks.check_model, config(model, "out", "--model.vae", str(place)))
        assert not [word for word in words if word not in message], message


def test_a_schedule_that_ends_in_noise_needs_v_prediction(model: Path) -> None:
    zero_snr = ("--model.rescale_betas_zero_snr", "true")
    scheduler = model / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(NOISE | {"prediction_type": "epsilon"}))
    message = refusal(checks.check_model, config(model, "out", *zero_snr))
    assert "model.rescale_betas_zero_snr" in message and "v_prediction" in message
    checks.check_model(config(model, "out", *zero_snr, "--model.prediction_type", "v_prediction"))
    scheduler.write_text(json.dumps(NOISE | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}))
    checks.check_model(config(model))
    assert "epsilon" in refusal(checks.check_model, config(model, "out", "--model.prediction_type", "epsilon"))
    checks.check_model(
        config(model, "out", "--model.prediction_type", "epsilon", "--model.rescale_betas_zero_snr", "false")
    )


def test_a_single_file_passes_and_says_how_much_space_it_needs(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    make_random = ["doctor", "--make-random", "tiny-sd15", str(tmp_path / "d"), "--single-file", str(file)]
    assert cli.main(make_random) == 0
    assert checks.check_model(config(file)) == file
    # The U-Net in fp16, and the changed tensors in fp32, as many as the scope trains of the loaded model.
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "d" / "unet")
    for scope in get_args(Scope):
        trained = sum(unet.get_parameter(name).numel() for name in trainable_names(unet, scope))
        for place in (file, tmp_path / "d"):
            cfg = config(place, "outputs/none", "--train.scope", scope)
            held = 1_106_212 * 2 if place == file else (tmp_path / "d" / UNET).stat().st_size
            assert preflight.needed_bytes(cfg, place) == 32 * 2**20 + held + 4 * trained
    assert "model.variant" in refusal(checks.check_model, config(file, "out", "--variant", "fp16"))


def test_a_full_disk_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(model, tmp_path / "out")
    preflight.check_all(cfg)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    message = refusal(preflight.check_all, cfg)
    assert "output_dir" in message and "1 MiB free" in message and "32 MiB" in message


def test_checkpoints_need_more_space(model: Path) -> None:
    shapes = {
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight": (11, 20),
        "conv_in.weight": (780, 1, 1, 1),
    }
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, model / UNET)
    without = preflight.needed_bytes(config(model), model)
    kept = ("--checkpointing_steps", "10", "--checkpoints_total_limit", "3")
    # Four checkpoints of three fp32 numbers for each trained parameter; attn2 is 22 % of them.
    assert preflight.needed_bytes(config(model, "out", *kept), model) - without == 4 * 12 * 220


@pytest.mark.parametrize(
    ("choice", "words"), [("trition", ["'trition'", "auto, reference, triton", "nearest: triton"]), ("triton", ["GPU"])]
)
def test_a_choice_of_kernels_that_cannot_work_is_refused_early(
    choice: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (preflight.KERNELS_VARIABLE, preflight.KERNEL_CHOICES) == (backend.VARIABLE, backend.CHOICES)
    monkeypatch.setenv("FASTUNLEARN_KERNELS", choice)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError) as refusal:
        preflight.check_kernels(has_gpu=False)
    assert all(word in str(refusal.value) for word in ["FASTUNLEARN_KERNELS", *words])
    monkeypatch.setenv("FASTUNLEARN_KERNELS", "reference")
    preflight.check_kernels(has_gpu=False)
