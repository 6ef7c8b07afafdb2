"""The wheel, installed into an empty environment outside the checkout: its files, and README's first command there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("fastunlearn", "kernels", "configs", "pyproject.toml", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
# So that README's first command takes seconds here.
SHORTER = (
    "--max_train_steps", "2", "--evaluation.mode", "off", "--evaluation.num_inference_steps", "2",
    "--progress.enabled", "false",
    "--report.num_validation_seeds", "1", "--report.report_to", "none",
)  # fmt: skip


def clean_environment(binaries: Path) -> dict[str, str]:
    """Without the paths by which a checkout's package could be found."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env["PATH"] = os.pathsep.join([str(binaries), str(Path(sys.executable).parent), env["PATH"]])
    return env | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: a build in the checkout would leave files there, and take old ones along."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(tree)]
    subprocess.run(command, check=True, env=clean_environment(folder))
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def binaries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a new environment with the wheel in it; what the wheel requires is read from the tests' environment.

    That folder is named in a .pth file, so that the .pth files in it, such as an editable install's, are not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    command = [*PIP, "--python", str(python), "install", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run(command, check=True, env=clean_environment(folder / "bin"))
    (site,) = folder.glob("lib/python*/site-packages")
    required = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "required.pth").write_text("\n".join(sorted(required)) + "\n")
    return folder / "bin"


def run(binaries: Path, folder: Path, *command: str) -> str:
    """What a command of that environment prints, started in ``folder``."""
    done = subprocess.run(
        [str(binaries / command[0]), *command[1:]],
        cwd=folder, env=clean_environment(binaries), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def first_command() -> list[str]:
    """README's first ``fastunlearn`` command."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^```bash\n(fastunlearn .*)$", text, re.MULTILINE)
    assert found is not None
    return found[1].split()


def test_the_wheel_holds_presets_model_and_kernels(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    presets = {f"fastunlearn/configs/{path.name}" for path in (ROOT / "configs").glob("*.toml")}
    modules = {
        path.relative_to(root).as_posix()
        for root, package in ((ROOT, "fastunlearn"), (ROOT / "kernels", "fastunlearn_kernels"))
        for path in (root / package).rglob("*.py")
    }
    data = {
        *(f"fastunlearn/minicanvas/model/{name}" for name in MODEL_FILES),
        "fastunlearn/minicanvas/judge.safetensors",
        "fastunlearn/minicanvas/pictures/ATTRIBUTION.md",
        "fastunlearn/minicanvas/pictures/noto-v1/cat.png",
        "fastunlearn/models/formats/clip_vocabulary/merges.txt",
        "fastunlearn/py.typed",
        "fastunlearn_kernels/py.typed",
    }
    assert not (presets | modules | data) - names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "kernels/", "configs/"))]


MODEL_FILES = (
    "model_index.json", "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors", "text_encoder_2/model.safetensors", "scheduler/scheduler_config.json",
    *(f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2")
      for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")),
)  # fmt: skip


def test_the_source_archive_holds_the_same(tree: Path, wheel: Path, tmp_path: Path) -> None:
    """But for metadata, whatever a wheel of the archive is made from is in it."""
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2].removeprefix("kernels/") for name in opened.getnames()}
    assert not {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} - names


def test_the_installed_package_is_the_wheels(binaries: Path, tmp_path: Path) -> None:
    say = "import fastunlearn, fastunlearn_kernels as k; print(fastunlearn.__file__); print(k.__file__)"
    for line in run(binaries, tmp_path, "python", "-c", say).split():
        assert Path(line).is_relative_to(binaries.parent)


def test_readmes_first_command_runs_there(binaries: Path, tmp_path: Path) -> None:
    run(binaries, tmp_path, *first_command(), *SHORTER)
    folder = tmp_path / first_command()[-1]
    for name in ("samples/before_after.png", "unet/config.json", "README.md", "config.toml"):
        assert (folder / name).is_file()


def test_presets_and_help_are_there(binaries: Path, tmp_path: Path) -> None:
    listed = run(binaries, tmp_path, "fastunlearn", "presets")
    for path in (ROOT / "configs").glob("*.toml"):
        assert path.stem.replace("_", "-") in listed
    assert "--preset" in run(binaries, tmp_path, "fastunlearn", "train", "--help")
    assert "usage" in run(binaries, tmp_path, "python", "-m", "fastunlearn", "--help")
