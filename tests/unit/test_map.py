"""``docs/project/map.md`` and the tree agree, every link of the docs resolves, and the notebook's index is complete.

``python tests/unit/test_map.py`` writes the map's table from the docstrings of the packages.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MAP = DOCS / "project" / "map.md"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
TABLE = re.compile(r"(?<=\| package \| does \|\n\|---\|---\|\n)(?:\|.*\n)*")


def floors() -> list[list[str]]:
    """Packages and modules of each floor, from the top, as listed by the contract in ``pyproject.toml``."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if "docs/project/map.md" in each["name"])
    return [layer.split(" | ") for layer in layers]


def row(folder: Path) -> str:
    source = (folder / "__init__.py").read_text(encoding="utf-8")
    sentence = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0].replace("``", "`")
    return f"| `{folder.relative_to(ROOT).as_posix().replace('/', '.')}` | {sentence} |\n"


def table() -> str:
    """Lists every package once, in the order of the floors; within a floor, a package precedes those it contains."""
    tops = [ROOT / name.replace(".", "/") for floor in floors() for name in floor]
    return "".join(
        row(file.parent) for top in tops for file in sorted(top.rglob("__init__.py"), key=lambda f: f.parent)
    )


@functools.cache
def anchors(page: Path) -> set[str]:
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    own = set(re.findall(r' id="([\w-]+)', text))
    return own | {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_map_has_the_first_line_of_every_package() -> None:
    found = TABLE.search(MAP.read_text(encoding="utf-8"))
    assert found is not None
    assert found.group(0) == table(), "run `make tables`"


def test_every_package_has_its_sentence_and_its_floor() -> None:
    rows = table().splitlines()
    assert [line for line in rows if not line.endswith(". |")] == []
    packages = [path for top in ("overfill", "services") for path in (ROOT / top).rglob("__init__.py")]
    assert len(rows) == len(packages) - 1, "every package but `overfill` itself"


def test_the_map_draws_the_floors() -> None:
    drawn = re.findall(r"^ +\d+  (\w+(?: +\| +\w+)*)", MAP.read_text(encoding="utf-8"), re.MULTILINE)
    names = [re.split(r" +\| +", line) for line in drawn]
    assert names == [[package.removeprefix("overfill.") for package in packages] for packages in floors()]


def test_the_map_names_files_that_exist() -> None:
    text = MAP.read_text(encoding="utf-8")
    named = re.findall(r"`((?:overfill|services|tests|proto|deploy|loadtest)/[\w./]*)`", text)
    assert len(named) >= 20
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / path)) if path else page
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_notebook_lists_every_note_with_its_question() -> None:
    rows = []
    for note in (DOCS / "lab").glob("2*.md"):
        begin = " ".join(note.read_text(encoding="utf-8").split("\n\n")[1].split())
        question, _, outcome = begin.removeprefix("**Question:** ").partition(" **Outcome:** ")
        rows.append(f"| {note.name[:10]} | [{question}]({note.name}) | {outcome} |")
    index = (DOCS / "lab" / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| 20.*", index, re.MULTILINE)) == sorted(rows)


if __name__ == "__main__":
    MAP.write_text(TABLE.sub(lambda _: table(), MAP.read_text(encoding="utf-8")), encoding="utf-8")
