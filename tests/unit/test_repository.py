"""The repository itself: file sizes, scripts, import circles, class names. `make check` compares the generated code."""

from __future__ import annotations

import ast
import importlib
import subprocess
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
MAX_BYTES = 2 * 1024 * 1024


def scripts() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return dict(project["scripts"])


def test_no_large_file_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    large = [str(path.relative_to(ROOT)) for path in paths if path.is_file() and path.stat().st_size > MAX_BYTES]
    assert large == []


@pytest.mark.parametrize("script", scripts())
def test_every_console_script_has_its_function(script: str) -> None:
    module, _, function = scripts()[script].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_no_modules_import_each_other_in_a_circle() -> None:
    # The graph includes imports for type checkers and those within functions.
    graph = grimp.build_graph("overfill", "services", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


SHARED_CLASS_NAMES = {
    "Message",  # of the Python client and of the OpenAI API
    "ToolCall",  # of the Python client and of the OpenAI API
}


def test_no_two_public_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for package in ("overfill", "services"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.is_relative_to(ROOT / "overfill" / "v1"):
                continue
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {n: p for n, p in places.items() if len(p) > 1 and n not in SHARED_CLASS_NAMES} == {}
