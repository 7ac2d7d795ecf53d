"""``docs/map.md`` and the tree agree, every link of the docs resolves, and the notebook's index is complete."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MAP = (DOCS / "map.md").read_text(encoding="utf-8")
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
ROWS = re.findall(r"^\| \[`([\w.]+)`\]\(\.\./([\w/]+)\) \| (.+) \|$", MAP, re.MULTILINE)


def first_line(package: str) -> str:
    source = (ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0].replace("``", "`")


def floors() -> list[set[str]]:
    """Packages of each floor, from the top, as the contract in ``pyproject.toml`` has them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if "docs/map.md" in each["name"])
    return [set(layer.split(" | ")) for layer in layers]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_map_has_every_package_once() -> None:
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("overfill", "services")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert sorted(name for name, _, _ in ROWS) == sorted(packages - {"overfill"})
    assert all(folder == name.replace(".", "/") for name, folder, _ in ROWS)


@pytest.mark.parametrize(("package", "sentence"), [(name, sentence) for name, _, sentence in ROWS])
def test_the_map_says_what_the_docstring_says(package: str, sentence: str) -> None:
    assert sentence == first_line(package)


def test_the_map_follows_the_floors() -> None:
    floor = {package: number for number, packages in enumerate(floors()) for package in packages}
    order = [floor[".".join(name.split(".")[: 1 if name.startswith("services") else 2])] for name, _, _ in ROWS]
    assert order == sorted(order)
    drawn = re.findall(r"^ +\d+  (\w+(?: +\| +\w+)*)", MAP, re.MULTILINE)
    names = [set(re.split(r" +\| +", line)) for line in drawn]
    assert names == [{package.removeprefix("overfill.") for package in packages} for packages in floors()]


def test_the_map_names_files_that_exist() -> None:
    named = re.findall(r"`((?:overfill|services|tests|proto|deploy|loadtest)/[\w./]*)`", MAP)
    assert len(named) >= 20
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_notebook_lists_every_note_with_its_question() -> None:
    index = (DOCS / "lab" / "README.md").read_text(encoding="utf-8")
    for note in (DOCS / "lab").glob("2*.md"):
        begin = " ".join(note.read_text(encoding="utf-8").split("\n\n")[1].split())
        question, _, outcome = begin.removeprefix("**Question:** ").partition(" **Outcome:** ")
        assert f"| {note.name[:10]} | [{question}]({note.name}) | {outcome} |" in index
