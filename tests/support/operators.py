"""Kubernetes operators' resource definitions (CRDs), and strict validation of objects against them.

The definitions are files in ``../shared/schemas``, one CRD each. If that folder is missing, tests that need them are
skipped.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

SCHEMAS = Path(__file__).parents[3] / "shared" / "schemas"

needs_definitions = pytest.mark.skipif(
    not SCHEMAS.is_dir(), reason="the operators' resource definitions are missing: no folder ../shared/schemas"
)

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # without C, definitions of up to 1.5 MB take minutes


def validate(obj: dict[str, Any]) -> None:
    """Validate an operator's object; unknown fields are errors, except where the definition preserves them.

    Raises:
        jsonschema.ValidationError: a field is unknown, missing or has a wrong value.
        FileNotFoundError: no definition has the object's group and kind.
    """
    group, _, version = obj["apiVersion"].partition("/")
    _validator(group, version, obj["kind"]).validate(obj)


@cache
def _validator(group: str, version: str, kind: str) -> Any:
    for path in SCHEMAS.glob(f"{group}_*.yaml"):
        spec = yaml.load(path.read_text(), Loader=_Loader)["spec"]
        if spec["names"]["kind"] == kind:
            (schema,) = [each["schema"]["openAPIV3Schema"] for each in spec["versions"] if each["name"] == version]
            strict = _strict(schema)
            strict["properties"]["metadata"] = {"type": "object"}  # defined by Kubernetes
            return jsonschema.Draft7Validator(strict)
    raise FileNotFoundError(f"no definition of {kind} ({group}) in {SCHEMAS}")


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Return ``schema`` as JSON Schema that refuses unknown fields.

    ``anyOf``, ``allOf`` and ``not`` stay as they are: Kubernetes lets them restrict fields, not declare any.
    """
    strict = dict(schema)
    if strict.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
        strict.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if "properties" in schema:
        strict["properties"] = {name: _strict(value) for name, value in schema["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            strict[key] = _strict(schema[key])
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict
