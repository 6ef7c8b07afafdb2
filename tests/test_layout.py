"""The rules of the source tree: which way imports point, who knows a foreign library, how long a module may be.

Read from the source with `ast`; nothing is imported. Every import counts, also one inside a function or for types only:
a type that a lower module names is a fact that it knows of an upper one. `LAYERS` holds the allowed direction in
fastunlearn and the kernels; in benchmarks and tests no module and no folder may be in a circle.
`python tests/test_layout.py` prints every offence.
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
BENCHMARKS = ROOT / "benchmarks"
TESTS = ROOT / "tests"
MODULES = sorted([*TRAINER.rglob("*.py"), *KERNELS.rglob("*.py")])
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))

# From the top of the house to its foundations. A package imports what stands below it, and nothing beside or above it.
LAYERS = (
    ("fastunlearn.__main__",),
    ("fastunlearn.cli",),
    ("fastunlearn.commands",),
    ("fastunlearn.minicanvas.build",),
    ("fastunlearn.train",),
    ("fastunlearn.training",),
    ("fastunlearn.export",),
    ("fastunlearn.evaluation",),
    ("fastunlearn.planning",),
    ("fastunlearn.methods",),
    ("fastunlearn.meta",),
    ("fastunlearn.sampling",),
    ("fastunlearn.engines",),
    ("fastunlearn.gradients",),
    ("fastunlearn.denoisers",),
    ("fastunlearn.acceleration",),
    ("fastunlearn.models",),
    ("fastunlearn.config",),
    ("fastunlearn.prompts",),
    ("fastunlearn.schema",),
    ("fastunlearn.minicanvas.data",),
    ("fastunlearn.minicanvas",),
    ("fastunlearn.registry",),
    ("fastunlearn.utils",),
    ("fastunlearn.errors",),
    ("fastunlearn_kernels.testing",),
    ("fastunlearn_kernels",),
    ("fastunlearn_kernels.adamw8bit",),
    ("fastunlearn_kernels.gradients",),
    ("fastunlearn_kernels.quantize",),
    ("fastunlearn_kernels.latent",),
    ("fastunlearn_kernels.common",),
)
LEVEL = {name: len(LAYERS) - row for row, names in enumerate(LAYERS) for name in names}

MAX_LINES = 350
MAX_LINES_OF = {"fastunlearn/train.py": 120}
MAX_MODULES = 10  # of one package, its sub-packages apart

# Foreign library -> the only files that import it.
ONE_FILE_KNOWS = {
    "deepspeed": {"fastunlearn/engines/zero/engine.py", "fastunlearn/utils/distributed.py"},
    "bitsandbytes": {"fastunlearn/engines/optimizers"},
    "xformers": {"fastunlearn/acceleration/attention.py"},
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(path: Path) -> str:
    """fastunlearn/methods/kscu.py -> fastunlearn.methods.kscu"""
    if TESTS in path.parents:
        return path.stem  # their folders are on the path
    base = ROOT / "kernels" if KERNELS in path.parents else BENCHMARKS if BENCHMARKS in path.parents else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str | None:
    """The longest entry of LAYERS that the module is in."""
    found = [name for name in LEVEL if module == name or module.startswith(name + ".")]
    return max(found, key=len, default=None)


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of everything the file imports, anywhere in it, also for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


@cache
def module_names() -> dict[str, Path]:
    return {dotted(path): path for path in [*MODULES, *modules_of(BENCHMARKS), *modules_of(TESTS)]}


def modules_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Those of our own modules that the file imports."""
    return {name for name in imports(path) if name in module_names()} - {dotted(path)}


def offences() -> list[str]:
    """Imports that point sideways or up."""
    found = []
    for path in MODULES:
        own = layer_of(dotted(path))
        for module in sorted(imported_modules(path)):
            other = layer_of(module)
            if own is None or other is None or module == "fastunlearn":
                continue
            if own != other and LEVEL[other] >= LEVEL[own]:
                found.append(f"{dotted(path)} imports {module}")
    return found


def circles(paths: list[Path]) -> list[str]:
    """Modules that import each other in a ring, found by taking away whatever imports nothing that is left."""
    return in_a_ring({dotted(path): imported_modules(path) for path in paths})


def circles_of_folders(paths: list[Path]) -> list[str]:
    """The same of the folders that they are in."""
    graph: dict[str, set[str]] = {}
    for path in paths:
        needs = {name_of(module_names()[module].parent) for module in imported_modules(path)}
        graph.setdefault(name_of(path.parent), set()).update(needs - {name_of(path.parent)})
    return in_a_ring(graph)


def in_a_ring(graph: dict[str, set[str]]) -> list[str]:
    while True:
        free = {name for name, needs in graph.items() if not needs & graph.keys()}
        if not free:
            return sorted(graph)
        graph = {name: needs for name, needs in graph.items() if name not in free}


def imports_package(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imports(path))


def test_imports_point_down() -> None:
    assert not offences()


def test_every_module_stands_in_a_layer() -> None:
    assert not [name for name in map(dotted, MODULES) if name != "fastunlearn" and layer_of(name) is None]


def test_no_circle_of_modules() -> None:
    assert not circles(MODULES)


@pytest.mark.parametrize("folder", [BENCHMARKS, TESTS], ids=name_of)
def test_no_circle_of_modules_or_folders_in(folder: Path) -> None:
    assert not circles(modules_of(folder))
    assert not circles_of_folders(modules_of(folder))


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=name_of)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
    assert roots <= {"torch", "triton", "fastunlearn_kernels"}


@pytest.mark.parametrize("library", ONE_FILE_KNOWS)
def test_one_place_knows_each_foreign_library(library: str) -> None:
    places = tuple(ONE_FILE_KNOWS[library])
    importers = [name_of(path) for path in MODULES if imports_package(path, library)]
    assert importers and all(name.startswith(places) for name in importers)


def test_no_module_has_the_name_of_a_library() -> None:
    """`deepspeed fastunlearn/train.py` puts fastunlearn/ first on sys.path until train.py removes it."""
    ours = {path.stem for path in TRAINER.glob("*.py")} | {path.parent.name for path in TRAINER.glob("*/__init__.py")}
    libraries = set(packages_distributions()) | sys.stdlib_module_names | {"datasets", "evaluate", "kernels", "wandb"}
    assert not (ours - {"__init__", "__main__"}) & (libraries - {"fastunlearn", "fastunlearn_kernels"})


def test_no_package_is_called_kernels() -> None:
    """It would shadow Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


def test_packages_are_small_and_say_what_lives_there() -> None:
    for folder in sorted({path.parent for path in MODULES}):
        front = folder / "__init__.py"
        assert front.is_file(), f"{name_of(folder)} has no __init__.py"
        assert ast.get_docstring(ast.parse(front.read_text(encoding="utf-8"))), f"{name_of(front)} says nothing"
        assert len(list(folder.glob("*.py"))) <= MAX_MODULES + 1, f"{name_of(folder)} holds too many modules"


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


if __name__ == "__main__":
    everywhere = [path for folder in (BENCHMARKS, TESTS) for path in modules_of(folder)]
    rings = [*circles([*MODULES, *everywhere]), *circles_of_folders(everywhere)]
    print("\n".join([*offences(), *(f"in a circle: {name}" for name in rings)]))
