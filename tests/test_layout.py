"""The rules of the source tree: which way imports point, what modules may be called, how long they are.

Read from the source with `ast`; nothing is imported, except by the test that loads every config.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAINER = ROOT / "fastunlearn"
KERNELS = ROOT / "kernels" / "fastunlearn_kernels"
MODULES = sorted([*TRAINER.rglob("*.py"), *KERNELS.rglob("*.py")])
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))

MAX_LINES = 350
MAX_LINES_OF = {"fastunlearn/train.py": 120}

# Foreign library -> the only files that import it.
ONE_FILE_KNOWS = {
    "deepspeed": {"fastunlearn/zero.py", "fastunlearn/cli.py"},  # cli.py: the launcher only
    "bitsandbytes": {"fastunlearn/optimizers.py"},
    "xformers": {"fastunlearn/attention.py"},
}
# Layer -> modules of fastunlearn that nothing in it may import.
MUST_NOT_IMPORT = {
    "fastunlearn/methods/": {"trainer", "train", "cli", "zero", "checkpoint", "exporting", "scoring", "optimizers"},
    "fastunlearn/scoring/": {"trainer", "train", "cli", "zero", "methods", "rollout", "checkpoint"},
    "fastunlearn/relearning/": {"trainer", "train", "cli", "zero", "methods", "checkpoint", "exporting", "assembly"},
    "fastunlearn/minicanvas/": {"trainer", "train", "cli", "zero", "methods", "rollout", "checkpoint"},
    "fastunlearn/config": {"trainer", "train", "cli", "zero", "methods", "rollout", "checkpoint", "scoring"},
    "fastunlearn/rollout.py": {"trainer", "train", "cli", "zero", "methods", "checkpoint", "scoring"},
    "fastunlearn/teacher.py": {"trainer", "train", "cli", "methods", "checkpoint", "scoring"},
    "fastunlearn/zero.py": {"trainer", "train", "cli", "methods", "rollout", "scoring"},
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of everything the file imports, anywhere in it; relative imports made absolute."""
    package = path.relative_to(ROOT / "kernels" if KERNELS in path.parents else ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def imports_package(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imports(path))


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=name_of)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
    assert roots <= {"torch", "triton", "fastunlearn_kernels"}


def test_only_the_entry_points_import_the_trainer() -> None:
    importers = {name_of(path) for path in MODULES if imports_package(path, "fastunlearn.trainer")}
    assert importers <= {"fastunlearn/train.py", "fastunlearn/cli.py"}


@pytest.mark.parametrize("library", ONE_FILE_KNOWS)
def test_one_file_knows_each_foreign_library(library: str) -> None:
    importers = {name_of(path) for path in MODULES if imports_package(path, library)}
    assert importers <= ONE_FILE_KNOWS[library]


@pytest.mark.parametrize("layer", MUST_NOT_IMPORT)
def test_imports_point_one_way(layer: str) -> None:
    offences = [
        f"{name_of(path)} imports {module}"
        for path in MODULES
        if name_of(path).startswith(layer)
        for module in MUST_NOT_IMPORT[layer]
        if imports_package(path, f"fastunlearn.{module}")
    ]
    assert not offences


def test_no_module_has_the_name_of_a_library() -> None:
    """`deepspeed fastunlearn/train.py` puts fastunlearn/ first on sys.path until train.py removes it."""
    ours = {path.stem for path in TRAINER.glob("*.py")} | {path.parent.name for path in TRAINER.glob("*/__init__.py")}
    libraries = set(packages_distributions()) | sys.stdlib_module_names | {"datasets", "evaluate", "kernels", "wandb"}
    assert not (ours - {"__init__"}) & (libraries - {"fastunlearn", "fastunlearn_kernels"})


def test_no_package_is_called_kernels() -> None:
    """It would shadow Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_is_short_and_says_what_it_is(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_LINES_OF.get(name_of(path), MAX_LINES)
    assert ast.get_docstring(ast.parse(source)), "the module needs a docstring"


def test_there_are_configs() -> None:
    assert {path.name for path in CONFIGS} >= {"minicanvas_style.toml", "minicanvas_object.toml"}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_loads_and_says_how_to_run_it(path: Path) -> None:
    from fastunlearn.config import load_config

    config = load_config(str(path), [])
    assert config.concepts
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert header.startswith("#") and f"configs/{path.name}" in header, "its first comment gives the exact command"
