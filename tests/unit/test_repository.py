"""The repository itself: generated code, file sizes, entry points."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
STUBS = ROOT / "overfill" / "v1"
MAX_BYTES = 2 * 1024 * 1024


def scripts() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return dict(project["scripts"])


def test_generated_code_is_what_the_proto_files_give(tmp_path: Path) -> None:
    protos = sorted(str(path) for path in (ROOT / "proto").rglob("*.proto"))
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "grpc_python_out", "pyi_out")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *outputs, *protos]
    # The generator imports pkg_resources, which warns about itself.
    subprocess.run(command, check=True, env={"PYTHONWARNINGS": "ignore"})
    fresh = {path.name: path.read_text() for path in (tmp_path / "overfill" / "v1").iterdir()}
    assert len(fresh) == 3 * len(protos)
    committed = {path.name: path.read_text() for path in STUBS.iterdir() if path.is_file()}
    committed.pop("__init__.py")
    assert sorted(committed) == sorted(fresh), "run `make proto`"
    assert [name for name in fresh if fresh[name] != committed[name]] == [], "run `make proto`"


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
    graph = grimp.build_graph("overfill", "services", cache_dir=None)  # imports for type checkers and lazy ones count
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Version 2.0, January 2004" in text
