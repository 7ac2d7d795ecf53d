"""The JSON Schema of a stack's document, from ``StackSpec`` and the settings of the services."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from typing import Any

from pydantic import BaseModel

from overfill.settings.config import SERVICES, ServiceConfig
from overfill.settings.tiers import PoolSpec, TierSpec
from overfill.settings.worker_kinds import KINDS
from overfill.stack.spec import CanarySpec, RouterSpec, StackSpec

_ATTRIBUTES = re.compile(r"^Attributes:\n(.*)", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"^(\S.*?): ", re.MULTILINE)


def stack_schema() -> str:
    """Returns the schema as JSON.

    A setting's value has no type in it: a service also reads text such as ``512MiB``.
    """
    schema = StackSpec.model_json_schema()
    pools = schema.pop("$defs")
    of_tier = pools["TierSpec"]
    del of_tier["properties"]["name"]  # the key
    of_tier["required"] = ["pair"]
    for spec, made in (
        (StackSpec, schema),
        *((kind, pools[kind.__name__]) for kind in (PoolSpec, RouterSpec, TierSpec, CanarySpec)),
    ):
        _describe(spec, made)
    schema["properties"]["settings"] = _settings(*SERVICES)
    pools["RouterSpec"]["properties"]["settings"] = _settings(SERVICES[0])
    of_tier["properties"]["settings"] = {"$ref": "#/$defs/decode/properties/settings"}
    base = pools.pop("PoolSpec")
    for name, kind in KINDS.items():
        own = {"settings": _settings(kind.settings)}
        pools[name] = {**base, "type": ["object", "null"], "properties": base["properties"] | own}
        for properties in (schema["properties"], pools["CanarySpec"]["properties"]):
            if name in properties:
                properties[name] = {"$ref": f"#/$defs/{name}", "description": properties[name].get("description", "")}
    schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": pools}
    return json.dumps(schema, indent=2) + "\n"


def _describe(spec: type[BaseModel], made: dict[str, Any]) -> None:
    """Gives each property its text in the class's docstring, and removes titles that repeat the name."""
    made.pop("title", None)
    text = inspect.getdoc(spec) or ""
    made["description"] = " ".join(text.partition("\n\n")[0].split())
    known = {} if spec is PoolSpec else _meanings(PoolSpec)
    for name, about in (known | _meanings(spec)).items():
        if name in made["properties"]:
            made["properties"][name]["description"] = about
    for one in made["properties"].values():
        one.pop("title", None)


def _meanings(spec: type[BaseModel]) -> dict[str, str]:
    found = _ATTRIBUTES.search(inspect.getdoc(spec) or "")
    _, *parts = _ENTRY.split(textwrap.dedent(found[1])) if found else [""]
    return {
        name: " ".join(text.replace("``", "`").split())
        for names, text in zip(parts[::2], parts[1::2], strict=True)
        for name in names.split(", ")
    }


def _settings(*kinds: type[ServiceConfig]) -> dict[str, Any]:
    fields = {name: field for kind in reversed(kinds) for name, field in kind.model_fields.items() if name != "config"}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: {"description": field.description} for name, field in sorted(fields.items())},
    }
