"""README on a package index: every picture and link of it leads to a file of the repository, by an absolute address."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = runpy.run_path(str(ROOT / ".ci" / "package_index.py"))
ADDRESS = "https://example.org/owner/name"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("README.md", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    PROGRAM["prepare"](tmp_path, ADDRESS)
    return tmp_path


def test_pictures_and_links_are_absolute_and_lead_to_files(tree: Path) -> None:
    version = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["version"]
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", (tree / "README.md").read_text(encoding="utf-8"))
    assert sum(bool(picture) for picture, _ in links) == 2 and len(links) > 10
    for picture, link in links:
        assert link.startswith(("https://", "#"))
        start = f"{ADDRESS}/{'raw' if picture else 'blob'}/v{version}/"
        if link.startswith(ADDRESS):
            assert link.startswith(start) and (ROOT / link.removeprefix(start).partition("#")[0]).exists()


def test_the_repository_is_among_the_urls(tree: Path) -> None:
    urls = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Repository"] == ADDRESS
    assert all(url.startswith("https://") and "," not in label for label, url in urls.items())


@pytest.mark.parametrize("words", [[], ["somewhere"], ["https://one.org/a/b", "https://two.org/a/b"]])
def test_without_an_address_nothing_is_built(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert PROGRAM["main"](words) == 2
    assert capsys.readouterr().err.startswith("error: REPOSITORY: ")
