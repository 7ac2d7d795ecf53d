"""Every promise of docs/explanation/failure.md can be broken, and its test then fails."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_FILE = Path(__file__).with_name("broken_promises.py")
_spec = importlib.util.spec_from_file_location("broken_promises", _FILE)
assert _spec is not None
assert _spec.loader is not None
promises: Any = importlib.util.module_from_spec(_spec)
sys.modules["broken_promises"] = promises  # dataclasses look up annotations there
_spec.loader.exec_module(promises)


def words(broken: Any) -> str:
    return str(broken.promise).replace(" ", "-")


@pytest.mark.parametrize("broken", promises.BROKEN, ids=words)
def test_the_code_that_keeps_it_is_there_and_so_is_its_test(broken: Any) -> None:
    compile(promises.place_of(broken).replaced_by(broken.new), "broken", "exec")
    file, *names = broken.test.split("::")
    tree = ast.parse((promises.ROOT / file).read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef  # a class may inherit the test
    tests = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
    assert not names or names[0].partition("[")[0] in tests


def test_the_docs_tell_of_every_one() -> None:
    text = (promises.ROOT / "docs" / "explanation" / "failure.md").read_text(encoding="utf-8")
    assert [b.promise for b in promises.BROKEN if f"| {b.promise} | {b.how} |" not in text] == []


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    with promises.copied_tree() as copy:
        yield copy


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("broken", promises.BROKEN, ids=words)
def test_its_test_fails_without_it(tree: Path, broken: Any) -> None:
    noticed, said = promises.is_noticed(tree, broken)
    assert noticed, said
