"""The rules of the source tree: which way imports point, who knows a foreign library, how long a module may be.

Read from the source with `ast`; nothing is imported. Every import counts, also one inside a function, a relative one,
one by `import_module` or `__import__` with a literal name, or for types only: a type that a lower module names is a
fact that it knows of an upper one. `LAYERS` holds the allowed direction in fastunlearn and the kernels; inside a layer,
in benchmarks and in tests no module and no package may be in a circle. `python tests/test_layout.py` prints every
offence.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
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
    ("fastunlearn.progress",),
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
    "deepspeed": {
        "fastunlearn/engines/zero/engine.py",
        "fastunlearn/engines/zero/checkpoint_files.py",
        "fastunlearn/utils/distributed.py",
    },
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
    own = dotted(path)
    package = own if path.name == "__init__.py" else own.rpartition(".")[0]
    return frozenset(imported_names(path.read_text(encoding="utf-8"), package))


def imported_names(source: str, package: str) -> Iterator[str]:
    """``package``: what a relative import starts from."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute("." * node.level + (node.module or ""), package)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and called(node) in ("import_module", "__import__"):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield absolute(name.value, package)


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    function = node.func
    return getattr(function, "attr", "") or getattr(function, "id", "")


def absolute(name: str, package: str) -> str:
    """``..common.tiles`` in a.b.c -> a.b.common.tiles"""
    rest = name.lstrip(".")
    up = len(name) - len(rest)
    if not up:
        return name
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - up + 1], *([rest] if rest else [])])


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
        own = dotted(path)
        found += [f"{own} imports {name}" for name in sorted(imported_modules(path)) if is_up(own, name)]
    return found


def is_up(module: str, imported: str) -> bool:
    """Whether ``imported`` stands beside or above ``module``; the front of fastunlearn stands below everything."""
    own, other = layer_of(module), layer_of(imported)
    if other is None or own == other:
        return False
    return own is None or LEVEL[other] >= LEVEL[own]


def circles(paths: list[Path]) -> list[str]:
    """Modules that import each other in a ring, or stand between two rings."""
    return in_a_ring({dotted(path): imported_modules(path) for path in paths})


def circles_of_packages(paths: list[Path]) -> list[str]:
    """The same of packages, see `rings_of_packages`."""
    files = module_names()
    return rings_of_packages({path: {files[module] for module in imported_modules(path)} for path in paths})


def rings_of_packages(graph: Mapping[Path, set[Path]]) -> list[str]:
    """Circles between the packages in one folder, its own modules taken together as one; so in every folder.

    A package is all that lies in its folder, however deep. What is in different layers is a matter of `LAYERS`.
    """
    found = []
    for folder in sorted({folder for path in graph for folder in path.parents if ROOT in folder.parents}):
        packages: dict[str, set[str]] = {}
        for path, needs in graph.items():
            if folder in path.parents:
                own, layer = child(folder, path), layer_of(dotted(path))
                below = {child(folder, to) for to in needs if folder in to.parents and layer_of(dotted(to)) == layer}
                packages.setdefault(own, set()).update(below - {own})
        found += [f"{name_of(folder)}/{name}".removesuffix("/.") for name in in_a_ring(packages)]
    return found


def child(folder: Path, path: Path) -> str:
    """The sub-folder that the module is in; "." for one that lies in the folder itself."""
    parts = path.relative_to(folder).parts
    return parts[0] if len(parts) > 1 else "."


def in_a_ring(graph: Mapping[str, set[str]]) -> list[str]:
    """What is left without those that import, or are imported by, nothing that is left."""
    while True:
        needed = {to for name, needs in graph.items() for to in needs - {name}}
        left = {name: needs & graph.keys() for name, needs in graph.items() if name in needed and needs & graph.keys()}
        if left.keys() == graph.keys():
            return sorted(left)
        graph = left


def imports_package(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imports(path))


def test_imports_point_down() -> None:
    assert not offences()


def test_every_module_stands_in_a_layer() -> None:
    assert not [name for name in map(dotted, MODULES) if name != "fastunlearn" and layer_of(name) is None]


@pytest.mark.parametrize("folder", [TRAINER, KERNELS, BENCHMARKS, TESTS], ids=name_of)
def test_no_circle_of_modules_or_packages_in(folder: Path) -> None:
    assert not circles(modules_of(folder))
    assert not circles_of_packages(modules_of(folder))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import fastunlearn.training.setup", "fastunlearn.training.setup"),
        ("from fastunlearn.training import setup", "fastunlearn.training.setup"),
        ("from . import base", "fastunlearn.engines.zero.base"),
        ("from .base import Engine", "fastunlearn.engines.zero.base"),
        ("from ..fused import engine", "fastunlearn.engines.fused.engine"),
        ("from ...training.setup import prepare", "fastunlearn.training.setup"),
        ("def f():\n    importlib.import_module('fastunlearn.training')", "fastunlearn.training"),
        ("import_module('..fused.engine', __package__)", "fastunlearn.engines.fused.engine"),
        ("__import__('fastunlearn.cli')", "fastunlearn.cli"),
        ("if TYPE_CHECKING:\n    from fastunlearn.training.setup import Setup", "fastunlearn.training.setup"),
    ],
)
def test_no_way_of_importing_is_overlooked(line: str, name: str) -> None:
    assert name in set(imported_names(line, "fastunlearn.engines.zero"))


def test_what_points_up_is_an_offence() -> None:
    assert is_up("fastunlearn", "fastunlearn.errors") and not is_up("fastunlearn.errors", "fastunlearn")
    assert is_up("fastunlearn.models.loading", "fastunlearn.training.setup")
    assert is_up("fastunlearn_kernels.latent.add_noise", "fastunlearn_kernels.testing.report")
    assert not is_up("fastunlearn.training.setup", "fastunlearn.models.loading")


@pytest.mark.parametrize(
    ("imports_of", "ring"),
    [
        ({"grid": {"metrics/base"}, "metrics/base": {"grid"}}, {"", "metrics"}),
        ({"metrics/a": {"classifiers/a"}, "classifiers/b": {"metrics/b"}}, {"metrics", "classifiers"}),
        ({"metrics/deep/a": {"classifiers/a"}, "classifiers/b": {"metrics/b"}}, {"metrics", "classifiers"}),
        ({"metrics/deep/a": {"metrics/b"}, "metrics/c": {"metrics/deep/d"}}, {"metrics", "metrics/deep"}),
        ({"grid": {"metrics/base"}, "metrics/base": {"classifiers/base"}, "classifiers/deep/a": {"metrics/a"}},
         {"metrics", "classifiers"}),
        ({"a": {"metrics/base"}, "metrics/deep/a": {"classifiers/base"}, "metrics/b": {"metrics/deep/a"}}, set()),
    ],
)  # fmt: skip
def test_a_circle_of_packages_is_seen(imports_of: dict[str, set[str]], ring: set[str]) -> None:
    """Also where no two modules import each other, in whichever depth."""
    folder = TRAINER / "evaluation"
    graph = {folder / f"{name}.py": {folder / f"{to}.py" for to in needs} for name, needs in imports_of.items()}
    graph |= {to: set() for needs in list(graph.values()) for to in needs if to not in graph}
    assert set(rings_of_packages(graph)) == {f"fastunlearn/evaluation/{name}".removesuffix("/") for name in ring}


def test_what_the_registry_names_is_imported_without_torch() -> None:
    """The configuration, the planner and `--help` read it all."""
    code = """
import sys
from importlib import import_module
from fastunlearn import registry
for entries in vars(registry).values():
    if isinstance(entries, registry.Registry):
        for entry in entries.entries.values():
            import_module(entry.partition(":")[0])
            assert "torch" not in sys.modules, entry
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


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
    everywhere = [*MODULES, *modules_of(BENCHMARKS), *modules_of(TESTS)]
    rings = [*circles(everywhere), *circles_of_packages(everywhere)]
    print("\n".join([*offences(), *(f"in a circle: {name}" for name in rings)]))
