"""Build the wheel and the source archive that go to a package index, with README's links written out in full.

    python .ci/package_index.py https://github.com/OWNER/NAME      # or: make dist REPOSITORY=...

An index shows README without the files beside it. So its pictures and links are made to point to the repository, at the
tag of this version, and the repository's address is entered in the project's URLs. Git's tracked files are built, in a
folder of their own; the tree itself stays as it is. Pictures and files are addressed as GitHub does.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "output" / "dist"
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^]]*)\]\((?P<target>(?![a-z]+:|#)[^)]+)\)")


def absolute_links(text: str, repository: str, version: str) -> str:
    """``text`` with every relative link and picture at the tag of ``version`` in ``repository``."""

    def absolute(found: re.Match[str]) -> str:
        kind = "raw" if found["picture"] else "blob"
        address = f"{repository.rstrip('/')}/{kind}/v{version}/{found['target']}"
        return f"{found['picture']}[{found['text']}]({address})"

    return LINK.sub(absolute, text)


def prepare(tree: Path, repository: str) -> None:
    """Write the repository's address into README.md and pyproject.toml of a copy of the source tree."""
    project = (tree / "pyproject.toml").read_text(encoding="utf-8")
    version = tomllib.loads(project)["project"]["version"]
    readme = tree / "README.md"
    readme.write_text(absolute_links(readme.read_text(encoding="utf-8"), repository, version), encoding="utf-8")
    table = "[project.urls]\n"
    project = project.replace(table, f'{table}Repository = "{repository}"\n')
    (tree / "pyproject.toml").write_text(project, encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Build into ``output/dist``; the exit status."""
    if len(arguments) != 1 or not re.fullmatch(r"https://[^/\s]+/[^\s]+", arguments[0]):
        print("error: REPOSITORY: give the address of the public repository, https://host/owner/name", file=sys.stderr)
        return 2
    tree = OUTPUT / "tree"
    subprocess.run(["rm", "-rf", str(OUTPUT)], check=True)
    tree.mkdir(parents=True)
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", "HEAD"], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
    prepare(tree, arguments[0])
    sdist = f"from setuptools.build_meta import build_sdist; build_sdist({str(OUTPUT)!r})"
    subprocess.run([sys.executable, "-c", sdist], cwd=tree, check=True, stdout=subprocess.DEVNULL)
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(OUTPUT)]
    subprocess.run([*wheel, str(tree)], check=True)
    print("\n".join(str(path.relative_to(ROOT)) for path in sorted(OUTPUT.glob("fastunlearn-*"))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
