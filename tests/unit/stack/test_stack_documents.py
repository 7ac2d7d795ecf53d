"""Tests the documents of docs/reference/stack.md, and the JSON Schema that an editor reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from overfill.settings.reader import BadSettings
from overfill.stack.spec import StackSpec

REFERENCE = Path(__file__).parents[3] / "docs" / "reference"
EXAMPLES = dict(
    re.findall(r'^```yaml title="(\S+)"\n(.*?)^```', (REFERENCE / "stack.md").read_text("utf-8"), re.DOTALL | re.M)
)
SCHEMA = json.loads((REFERENCE / "stack.schema.json").read_text("utf-8"))


def fits(document: dict[str, Any]) -> bool:
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(document)


def test_the_page_has_an_example_of_each_kind_of_stack() -> None:
    assert [*EXAMPLES] == [
        "default.yaml", "colocated.yaml", "split.yaml", "tiers.yaml", "canary.yaml", "ray.yaml"
    ]  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_a_stack_and_comes_back_from_what_is_printed(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(EXAMPLES[name], encoding="utf-8")
    spec = StackSpec.load(path)
    path.write_text(str(spec), encoding="utf-8")
    assert StackSpec.load(path) == spec
    assert fits(yaml.safe_load(EXAMPLES[name]))
    assert fits(spec.document())


@pytest.mark.parametrize(
    "document",
    [
        {"decode": {"replica": 2}},
        {"decode": {"max_replicas": 1001}},
        {"tiers": {"a": {"pair": "p", "replicas": 1001}}},
        {"tiers": {"a": {}}},
        {"tiers": {"a": {"pair": "p", "name": "b"}}},
        {"router": {"ports": [70000]}},
        {"settings": {"kv_memroy": "1GiB"}},
        {"prefill": {"settings": {"kv_codec": "int8"}}},
        {"runner": "docker"},
        {"canary": {"pair": "p"}},
        {"canary": {"revision": "r2", "pair": "p", "colocated": {}}},
        {"canary": {"revision": "r2", "pair": "p", "decode": {"settings": {"kv_memroy": "1GiB"}}}},
        {"canary": {"revision": "r2", "pair": "p", "percent": 101}},
    ],
)
def test_the_schema_refuses_what_the_command_refuses(document: dict[str, Any]) -> None:
    assert not fits(document)
    with pytest.raises(BadSettings):
        StackSpec.read(document)
