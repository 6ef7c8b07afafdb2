"""What is trained is only what is recognised: models of other kinds and other makers, as they come.

Tiny models with the structure of SD 1 and SDXL, changed in one place each: refused by name, before weights are read, or
loaded as before.
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Payload
from safetensors.torch import load_file, save_file

from fastunlearn import cli
from fastunlearn.config import load_config
from fastunlearn.errors import UserError
from fastunlearn.models.checks import check_model
from fastunlearn.models.formats.folder_configs import PUBLIC_MODELS
from fastunlearn.models.formats.headers import is_hub_id, read_header
from fastunlearn.models.formats.random_weights import write_file, write_folder
from fastunlearn.models.formats.single_file import read_single_file
from fastunlearn.models.loading import load_pipeline, load_unet

UNET = "unet/diffusion_pytorch_model.safetensors"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    for kind in ("tiny-sdxl", "tiny-sd15"):
        write_folder(PUBLIC_MODELS[kind], root / kind, torch.float16, seed=3)
        write_file(PUBLIC_MODELS[kind], root / f"{kind}.safetensors", torch.float16, seed=3)
    return root


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "tiny-sd15", tmp_path / "model"))


def check(path: Path, *arguments: str) -> None:
    check_model(load_config(None, ["--concepts", "cat", f"--pretrained_model_name_or_path={path}", *arguments]))


def refused(path: Path, load: bool = False) -> str:
    with pytest.raises(UserError) as error:
        load_pipeline(path) if load else check(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(file: str, **fields: Any) -> Change:
    """Fields of a configuration; None takes one out."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | fields
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return change


def write(file: str, text: str) -> Change:
    return lambda folder: (folder / file).write_text(text)


SCHEDULER, VAE, CONFIG = "scheduler/scheduler_config.json", "vae/config.json", "unet/config.json"
TEXT, INDEX = "text_encoder/config.json", "model_index.json"
OTHER_KINDS: dict[str, tuple[Change, str]] = {
    "edm": (edit(SCHEDULER, _class_name="EDMEulerScheduler"), "EDM"),
    "edm sampler": (edit(SCHEDULER, _class_name="EDMDPMSolverMultistepScheduler"), "EDM"),
    "flow": (edit(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler", shift=3.0), "flow matching"),
    "flow heun": (edit(SCHEDULER, _class_name="FlowMatchHeunDiscreteScheduler"), "flow matching"),
    "edm in the index": (edit(INDEX, scheduler=["diffusers", "EDMEulerScheduler"]), "EDM"),
    "flow in the index": (edit(INDEX, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]), "flow matching"),
    "own scheduler": (edit(INDEX, scheduler=["my_noise", "PNDMScheduler"]), "my_noise.PNDMScheduler for a scheduler"),
    "few betas": (edit(SCHEDULER, trained_betas=[0.1, 0.2]), "2 trained_betas for 1000 timesteps"),
    "flow sigmas": (edit(SCHEDULER, use_flow_sigmas=True), "use_flow_sigmas"),
    "cosine": (edit(SCHEDULER, _class_name="CosineDPMSolverMultistepScheduler"), "cosine"),
    "cosine betas": (edit(SCHEDULER, beta_schedule="squaredcos_cap_v2"), "a cosine schedule"),
    "sigmoid betas": (edit(SCHEDULER, beta_schedule="sigmoid"), "'sigmoid'"),
    "no betas": (edit(SCHEDULER, beta_start=..., beta_end=..., beta_schedule=...), "does not state beta_start and"),
    "no schedule": (edit(SCHEDULER, beta_schedule=...), "does not state beta_schedule"),
    "no noise": (edit(SCHEDULER, beta_start=0.5, beta_end=0.1), "does not grow"),
    "unknown scheduler": (edit(SCHEDULER, _class_name="MyScheduler"), "MyScheduler"),
    "variance exploding": (edit(SCHEDULER, _class_name="KarrasVeScheduler"), "variance-exploding"),
    "latents shifted": (edit(VAE, latents_mean=[0.1] * 4, latents_std=[1.0] * 4), "latents_mean"),
    "latents scaled": (edit(VAE, latents_std=[0.5] * 4), "latents_std"),
    "shift factor": (edit(VAE, shift_factor=0.1159), "shift_factor"),
    "16 channels": (edit(VAE, latent_channels=16), "16 latent channels"),
    "tiny vae": (edit(VAE, _class_name="AutoencoderTiny"), "AutoencoderTiny"),
    "latent consistency": (edit(CONFIG, time_cond_proj_dim=256), "latent consistency"),
    "class condition": (edit(CONFIG, class_embed_type="projection"), "class_embed_type"),
    "noise level": (edit(CONFIG, num_class_embeds=1000), "num_class_embeds"),
    "kolors": (edit(CONFIG, encoder_hid_dim_type="text_proj", encoder_hid_dim=4096), "encoder_hid_dim_type"),
    "quantised": (edit(CONFIG, quantization_config={"load_in_4bit": True}), "quantised weights"),
    "other blocks": (edit(CONFIG, down_block_types=["KDownBlock2D", "KCrossAttnDownBlock2D"]), "KDownBlock2D"),
    "other text": (edit(INDEX, text_encoder=["transformers", "T5EncoderModel"]), "T5EncoderModel"),
    "own class": (edit(INDEX, unet=["my_unet", "MyUNet"]), "my_unet.MyUNet"),
    "own pipeline": (edit(INDEX, _class_name=["my_pipeline", "Mine"]), "_class_name"),
    "no tokenizer": (edit(INDEX, tokenizer=[None, None]), "has no tokenizer"),
}
NONSENSE: dict[str, tuple[Change, str]] = {
    "list": (write(CONFIG, "[1, 2]"), "no JSON object"),
    "nested": (write(CONFIG, "[" * 100_000), "nested too deeply"),
    "nested index": (write(INDEX, '{"a":' * 100_000), "nested too deeply"),
    "not utf-8": (lambda folder: (folder / VAE).write_bytes(b"\xff\xfe{}"), "not UTF-8"),
    "digits": (write(VAE, '{"latent_channels": ' + "9" * 5000 + "}"), "digits"),
    "nan": (write(VAE, '{"scaling_factor": NaN}'), "NaN"),
    "zero channels": (edit(CONFIG, in_channels=0), "in_channels"),
    "negative": (edit(CONFIG, block_out_channels=[-32, 64]), "block_out_channels"),
    "huge": (edit(CONFIG, block_out_channels=[2**40, 64]), "block_out_channels"),
    "many layers": (edit(CONFIG, layers_per_block=10**9), "layers_per_block"),
    "text for a number": (edit(CONFIG, cross_attention_dim="768"), "cross_attention_dim"),
    "levels": (edit(CONFIG, block_out_channels=[32, 32, 32]), "down_block_types"),
    "null": (edit(CONFIG, block_out_channels=None), "block_out_channels"),
    "betas": (edit(SCHEDULER, beta_start="0.1"), "beta_start"),
    "steps": (edit(SCHEDULER, num_train_timesteps=10**12), "num_train_timesteps"),
    "predicts": (edit(SCHEDULER, prediction_type="flow_prediction"), "prediction_type"),
    "factor": (edit(VAE, scaling_factor=0.0), "scaling_factor"),
    "tokens": (edit(TEXT, max_position_embeddings=10**9), "max_position_embeddings"),
    "heads": (edit(TEXT, num_attention_heads=7), "num_attention_heads"),
    "component": (edit(INDEX, vae=[{"a": 1}, 2]), "vae: a library and a class"),
    "component of none": (edit(INDEX, text_encoder=-1), "text_encoder: a library and a class"),
    "component of one": (edit(INDEX, vae=["diffusers"]), "vae: a library and a class"),
    "no scheduler": (lambda folder: (folder / SCHEDULER).unlink(), "scheduler_config.json' is missing"),
    "no text config": (lambda folder: (folder / TEXT).unlink(), "text_encoder/config.json' is missing"),
}


@pytest.mark.parametrize("name", [*OTHER_KINDS, *NONSENSE])
def test_another_kind_is_refused_by_name_before_loading(name: str, folder: Path) -> None:
    change, words = (OTHER_KINDS | NONSENSE)[name]
    change(folder)
    message = refused(folder)
    assert words in message and str(folder) in message and len(message) < 700
    assert refused(folder, load=True) == message, "whoever loads it, a command or a program"


def test_the_command_line_says_it_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(SCHEDULER, _class_name="EDMEulerScheduler")(folder)
    for command in ("train", "plan"):
        words = [command, "--concepts", "cat", f"--model.pretrained_model_name_or_path={folder}"]
        assert cli.main([*words, f"--output_dir={folder.parent / 'out'}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "EDM" in error
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        edit(SCHEDULER, _class_name="DPMSolverMultistepScheduler", use_karras_sigmas=True),
        edit(SCHEDULER, _class_name="EulerAncestralDiscreteScheduler", timestep_spacing="trailing"),
        edit(SCHEDULER, beta_start=..., beta_schedule=..., trained_betas=[0.0009 * i for i in range(1, 1001)]),
        edit(CONFIG, _diffusers_version="0.1", some_new_field={"a": [1]}),
        edit(INDEX, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"]),
        edit(INDEX, feature_extractor=["transformers", "CLIPImageProcessor"]),
        edit(INDEX, image_encoder=["transformers", "CLIPVisionModelWithProjection"]),
    ],
)  # fmt: skip
def test_what_makes_no_difference_is_loaded(change: Change, folder: Path) -> None:
    change(folder)
    check(folder)
    load_pipeline(folder)


def test_a_pickled_safety_checker_keeps_no_model_out(folder: Path) -> None:
    edit(INDEX, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])(folder)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{")
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"\x80")
    check(folder)
    assert load_pipeline(folder).safety_checker is None


# --- completeness ----------------------------------------------------------------------------------------------------


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_tensor_that_is_missing_or_another_is_known_before_loading(component: str, folder: Path) -> None:
    (file,) = (folder / component).glob("*.safetensors")
    name = next(iter(load_file(file)))
    change_tensors(file, lambda tensors: tensors.pop(name))
    message = refused(folder, load=True)
    assert f"lacks 1 tensors of its {component}" in message and str(folder / component) in message
    change_tensors(file, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    assert "shape [3, 5]" in refused(folder, load=True)


def test_a_vae_with_the_names_of_older_releases_is_complete(folder: Path) -> None:
    (file,) = (folder / "vae").glob("*.safetensors")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            changed = name
            for new, was in old.items():
                changed = changed.replace(new, was)
            tensors[changed] = tensors.pop(name)
        assert any(".query." in name for name in tensors)

    before = load_pipeline(folder).vae.state_dict()
    change_tensors(file, rename)
    after = load_pipeline(folder).vae.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_extra_tensors_are_nobodys_business(folder: Path) -> None:
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    change_tensors(file, lambda tensors: tensors.update({"text_model.embeddings.position_ids": torch.arange(77)}))
    load_pipeline(folder)


def shard(folder: Path, leave_out: bool = False, named: str | None = None) -> None:
    """The U-Net in two files with an index."""
    tensors = load_file(folder / UNET)
    names = sorted(tensors)
    files = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, folder / "unet" / file)
    weight_map = {name: named or file for file, own in files.items() for name in own}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / UNET).unlink()
    if leave_out:
        (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def test_shards_are_read_by_their_index(folder: Path) -> None:
    before = load_pipeline(folder).unet.state_dict()
    shard(folder)
    check(folder)
    after = load_pipeline(folder).unet.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_shard_that_is_missing_is_named_at_once(folder: Path) -> None:
    shard(folder, leave_out=True)
    assert "lacks 1 of 2 shards, such as 'diffusion_pytorch_model-00002-of-00002.safetensors'" in refused(folder)


@pytest.mark.parametrize("named", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "weights.bin"])
def test_an_index_leads_nowhere_else(folder: Path, named: str) -> None:
    shard(folder, named=named)
    assert "leads to other files" in refused(folder)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_an_index_of_another_shape(folder: Path, index: str) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    assert "index.json' is damaged" in refused(folder)


def test_weights_under_another_name(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet" / "my_model.safetensors")
    assert "holds 'my_model.safetensors', and neither 'diffusion_pytorch_model.safetensors'" in refused(folder)


def test_weights_in_8_bits_are_called_that(folder: Path, originals: Path, tmp_path: Path) -> None:
    name = next(iter(load_file(folder / UNET)))
    change_tensors(folder / UNET, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    assert "holds weights in fp8" in refused(folder)
    tensors = load_file(originals / "tiny-sdxl.safetensors")
    save_file(tensors | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "scaled.safetensors")
    assert "fp8 with scales" in refused(tmp_path / "scaled.safetensors")
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first].to(torch.float8_e5m2)}, tmp_path / "plain.safetensors")
    assert "holds weights in fp8" in refused(tmp_path / "plain.safetensors")


def test_an_edited_unet_that_lacks_a_tensor(folder: Path) -> None:
    load_unet(folder / "unet", torch.float32)
    change_tensors(folder / UNET, lambda tensors: tensors.pop("conv_in.weight"))
    with pytest.raises(UserError, match=r"lacks 1 tensors of its unet, such as conv_in.weight"):
        load_unet(folder / "unet", torch.float32)


# --- single files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ("edm_mean", "Playground v2.5"),
        ("edm_vpred.sigma_max", "CosXL"),
        ("flow", "flow-matching"),
    ],
)
def test_markers_of_another_process_are_seen(marker: str, words: str, originals: Path, tmp_path: Path) -> None:
    tensors = load_file(originals / "tiny-sdxl.safetensors")
    save_file(tensors | {marker: torch.zeros(4)}, tmp_path / "model.safetensors")
    assert words in refused(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.prediction_type": "edm"}, "predicts 'edm'"),
        ({"modelspec.prediction_type": "flow"}, "predicts 'flow'"),
        ({"modelspec.architecture": "stable-diffusion-v3-medium"}, "'stable-diffusion-v3-medium'"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "no whole model"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base"}, None),
        ({"modelspec.architecture": "Stable-Diffusion-XL-v1-Base", "modelspec.prediction_type": "Epsilon"}, None),
    ],
)
def test_what_a_file_says_of_itself(
    metadata: dict[str, str], words: str | None, originals: Path, tmp_path: Path
) -> None:
    save_file(load_file(originals / "tiny-sdxl.safetensors"), tmp_path / "model.safetensors", metadata=metadata)
    if words is None:
        assert read_single_file(tmp_path / "model.safetensors").name == "tiny-sdxl"
    else:
        assert words in refused(tmp_path / "model.safetensors")


def test_an_sdxl_file_without_its_text_projection(originals: Path, tmp_path: Path) -> None:
    tensors = load_file(originals / "tiny-sdxl.safetensors")
    del tensors["conditioner.embedders.1.model.text_projection"]
    save_file(tensors, tmp_path / "model.safetensors")
    message = refused(tmp_path / "model.safetensors", load=True)
    assert "lacks 1 tensors of its text_encoder_2, such as conditioner.embedders.1.model.text_projection" in message


def test_a_bare_unet_is_told_what_to_give_instead(originals: Path, tmp_path: Path) -> None:
    prefix = "model.diffusion_model."
    tensors = load_file(originals / "tiny-sdxl.safetensors")
    for name, cut in (("comfy", prefix), ("whole", "")):
        own = {key.removeprefix(cut): value for key, value in tensors.items() if key.startswith(prefix)}
        save_file(own, tmp_path / f"{name}.safetensors")
        assert "give the whole checkpoint that it came from" in refused(tmp_path / f"{name}.safetensors")


# --- headers ---------------------------------------------------------------------------------------------------------


def with_header(file: Path, text: bytes, length: int | None = None, body: int = 0) -> Path:
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text) if length is None else length) + text)
        stream.truncate(8 + len(text) + body)
    return file


TENSOR = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    "file",
    [
        lambda path: with_header(path, b"{}", length=5 * 10**9, body=6 * 10**9),
        lambda path: with_header(path, b"{}", length=10**11),
        lambda path: with_header(path, b"{}", length=2**64 - 1),
        lambda path: with_header(path, b"[" * 100_000),
        lambda path: with_header(path, b'{"a":' * 100_000),
        lambda path: with_header(path, TENSOR.replace(b"[2]", b"[" + b"9" * 5000 + b"]") + b"}", body=8),
        lambda path: with_header(path, TENSOR.replace(b"[0,8]", b"[0,80]") + b"}", body=8),
        lambda path: with_header(path, TENSOR.replace(b"[0,8]", b"[8,0]") + b"}", body=8),
        lambda path: with_header(path, TENSOR.replace(b"[2]", b"[-2]") + b"}", body=8),
        lambda path: with_header(path, TENSOR.replace(b"F32", b"F99") + b"}", body=8),
        lambda path: with_header(path, TENSOR + b"," + TENSOR[1:].replace(b'"a"', b'"b"') + b"}", body=8),
        lambda path: with_header(path, b'{"__metadata__":{"a":1}}'),
        lambda path: path.write_bytes(b"") or path,
    ],
)  # fmt: skip
def test_a_header_of_any_kind_is_one_line_at_once(file: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.safetensors' is corrupt: ") as error:
        read_header(file(tmp_path / "model.safetensors"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_path_of_weights_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("someone/sdxl-1.0") and is_hub_id("someone/model.v2")
    for name in ("models/mine.safetensors", "models/mine.SAFETENSORS", "models/old.ckpt", "./models", "a/b/c", "../a"):
        assert not is_hub_id(name), name
    assert "models/mine.safetensors' does not exist" in refused(Path("models/mine.safetensors"))


# --- nothing is executed ---------------------------------------------------------------------------------------------


def test_no_file_of_a_model_is_executed(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A payload under every name that some library would unpickle or import; then in the place of each file."""
    folder, marker = Path(shutil.copytree(originals / "tiny-sdxl", tmp_path / "model")), tmp_path / "executed"
    payload = pickle.dumps(Payload(marker))
    script = f"import os; os.mkdir({str(marker)!r})"
    for part in ("", "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "model.ckpt", "optimizer.bin"):
            (folder / part / name).write_bytes(payload)
        for name in ("pipeline.py", "modeling.py", "unet.py", "tokenization.py", "__init__.py", "conftest.py"):
            (folder / part / name).write_text(script)
    auto_map = {"AutoModel": "modeling.Model", "AutoTokenizer": ["tokenization.Tokenizer", None]}
    for config in ("text_encoder/config.json", "text_encoder_2/config.json", "tokenizer/tokenizer_config.json"):
        edit(config, auto_map=auto_map, trust_remote_code=True)(folder)
    load_pipeline(folder)
    assert not marker.exists()
    monkeypatch.syspath_prepend(folder)  # as ``python -m`` has it for who stands in the model's folder
    own: dict[str, Any] = {
        "unet": ["unet", "MyUNet"], "scheduler": ["modeling", "PNDMScheduler"], "_class_name": "pipeline",
    }  # fmt: skip
    for name, value in own.items():
        index = (folder / "model_index.json").read_text()
        edit("model_index.json", **{name: value})(folder)
        refused(folder)
        refused(folder, load=True)
        (folder / "model_index.json").write_text(index)
    for file in sorted(folder.rglob("*.safetensors")) + sorted(folder.rglob("*.json")):
        whole = file.read_bytes()
        file.write_bytes(payload)
        with pytest.raises(UserError):
            load_pipeline(folder)
        file.write_bytes(whole)
    assert not marker.exists()
    shutil.copy(folder / "unet" / "model.ckpt", tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", load=True)
    assert not marker.exists()
