"""The classes, messages and fields that the glossary names are in the tree, and each noun stands once."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/glossary.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (?!noun|---)([^|]+?) \|.*\|$", re.MULTILINE)
ROWS = ROW.findall(PAGE)
PLACES = re.findall(r"^\| ([^|]+?) \| .+ \| `([\w.]+)` in `([\w./]+)` \|$", PAGE, re.MULTILINE)


def python_names(source: str) -> set[str]:
    """Returns the top-level classes and names of a module, and ``Class.member`` of each field, property and method."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        match node:
            case ast.ClassDef(name=owner):
                names |= {owner, *(f"{owner}.{name}" for name in members(node))}
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


def members(owner: ast.ClassDef) -> list[str]:
    fields = [
        node.target.id for node in owner.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    return fields + [node.name for node in owner.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def proto_names(source: str) -> set[str]:
    """Returns the messages and enumerations of a file, and ``Message.field`` of each field."""
    names: set[str] = set()
    for owner, body in re.findall(r"^(?:message|enum) (\w+) \{(.*?)^\}", source, re.M | re.S):
        names |= {owner, *(f"{owner}.{field}" for field in re.findall(r"(\w+) = \d+;", body))}
    return names


def test_each_noun_stands_once() -> None:
    assert len(ROWS) >= 30
    assert sorted(set(ROWS)) == sorted(ROWS)


@pytest.mark.parametrize(("noun", "name", "path"), PLACES, ids=[noun for noun, *_ in PLACES])
def test_the_noun_is_in_the_tree(noun: str, name: str, path: str) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    assert name in (proto_names(source) if path.endswith(".proto") else python_names(source))


def test_only_measures_and_events_name_no_place() -> None:
    code, _, measures = PAGE.partition("## Measures and events")
    assert len(PLACES) == len(ROW.findall(code))
    assert len(ROWS) == len(PLACES) + len(ROW.findall(measures))
