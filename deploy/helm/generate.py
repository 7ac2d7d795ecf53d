"""Writes the Helm chart's ``README.md`` and ``values.schema.json``.

    python deploy/helm/generate.py [--check]

Values, defaults and descriptions come from ``values.yaml``, and the services' settings from
``overfill/settings/config.py``. With ``--check`` the program writes nothing; it prints the names of files that differ
and exits 1. Runs from any folder.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml

from overfill.settings.config import SERVICES, ColocatedConfig, DecodeConfig, PrefillConfig, ServiceConfig
from overfill.settings.config_file import flag_name
from overfill.settings.tiers import MAX_TIERS
from overfill.stack.spec import SET_BY_STACK

HELM = Path(__file__).parent
CHART = HELM / "overfill"
ROOT = HELM.parents[1]

MANAGED = SET_BY_STACK | {
    "config", "host", "api_keys", "stack_secret", "served_model_name", "grace_period", "log_level", "threads",
    "tls_cert", "tls_key", "tls_ca", "tls_name", "metrics_host", "metrics_port", "advertise",
}  # fmt: skip
"""Settings that the chart derives from other values."""

LEFT_OUT = {
    (ColocatedConfig, "tensor_parallel_size"),
    *((PrefillConfig, name) for name in ("kv_disk", "kv_disk_size", "kv_disk_bandwidth")),
    (DecodeConfig, "adapters"),
}
"""Settings of one kind of worker: those that it has only to refuse them, and those that values of its pool make."""

_OBJECT = {"type": "object"}
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_OBJECTS = {"type": "array", "items": {"type": "object"}}
_COUNT = {"type": "integer", "minimum": 1}
_NAME = r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$"  # of tiers and revisions
_SHARE = {"type": ["integer", "string"], "pattern": r"^(\d+%)?$", "minimum": 0}
SPECIAL: dict[str, dict[str, Any]] = {
    "nameOverride": {"type": "string", "pattern": r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?$"},
    "fullnameOverride": {"type": "string", "pattern": r"^([a-z]([a-z0-9-]*[a-z0-9])?)?$"},
    "resources": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
            for name in ("requests", "limits")
        },
    },
    "nodeSelector": _STRINGS,
    "annotations": _STRINGS,
    "podAnnotations": _STRINGS,
    "podLabels": _STRINGS,
    "labels": _STRINGS,
    "dashboardLabels": _STRINGS,
    "tolerations": _OBJECTS,
    "extraEnv": _OBJECTS,
    "pullSecrets": _OBJECTS,
    "clients": _OBJECTS,
    "dns.servers": _OBJECTS,
    "dns.ports": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 65535}},
    "scrapers": _OBJECTS,
    "extraEgress": _OBJECTS,
    "affinity": _OBJECT,
    "extraDnsNames": {"type": "array", "items": {"type": "string"}},
    "hostnames": {"type": "array", "items": {"type": "string"}},
    "parentRefs": _OBJECTS,
    "picker.port": {"type": "integer", "minimum": 1, "maximum": 65535},
    "failureMode": {"enum": ["FailOpen", "FailClose"]},
    "maxSurge": _SHARE,
    "maxUnavailable": _SHARE,
    "maxSkew": _COUNT,
    "threads": _COUNT,
    "minReplicas": _COUNT,
    "maxReplicas": _COUNT,
    "startupSeconds": _COUNT,
    "kvDisk.size": {"type": "string", "pattern": r"^([1-9]\d*Gi)?$"},
    "kvDisk.bandwidth": {"type": "string", "pattern": r"^([1-9]\d*(Mi|Gi))?$"},
    "shmSize": {"type": "string", "pattern": r"^[1-9]\d*(Ki|Mi|Gi)$"},
    "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "whenUnsatisfiable": {"enum": ["ScheduleAnyway", "DoNotSchedule"]},
    "accessMode": {"enum": ["ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"]},
    "source": {"enum": ["named", "claim", "hub"]},
    "type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "autoscaling.kind": {"enum": ["none", "hpa", "keda"]},
    "named.name": {"enum": ["default", "fast", "identity"]},
    "logLevel": {"enum": ["debug", "info", "warning", "error"]},
}
"""Last parts of a value's path -> its schema, where the default alone does not determine it."""


def settings_schema(kind: type[ServiceConfig]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        if name not in MANAGED and (kind, name) not in LEFT_OUT:
            kinds = (field.annotation, *get_args(field.annotation))  # itself, or one of a union
            choices = [choice for kind in kinds for choice in get_args(kind) if isinstance(choice, str)]
            described: dict[str, Any] = {"description": field.description}
            if field.annotation is bool:
                properties[flag_name(name)] = described | {"type": "boolean"}
                continue
            properties[flag_name(name)] = described | ({"enum": choices} if choices else {"type": ["string", "number"]})
    return {"type": "object", "additionalProperties": False, "properties": properties}


def schema(value: Any, path: tuple[str, ...], descriptions: dict[str, str]) -> dict[str, Any]:
    """Return the JSON schema of a value, inferred from its default. It allows only keys of ``values.yaml``."""
    made: dict[str, Any]
    special = next((s for end, s in SPECIAL.items() if path and ".".join(path).endswith(f".{end}")), None)
    special = special or SPECIAL.get(".".join(path))
    if path and path[-1] == "settings":
        made = settings_schema(next(kind for kind in SERVICES if kind.section == path[0]))
    elif special is not None:
        made = dict(special)
    elif isinstance(value, dict):
        properties = {key: schema(item, (*path, key), descriptions) for key, item in value.items()}
        made = {"type": "object", "additionalProperties": False, "properties": properties}
    elif isinstance(value, bool):
        made = {"type": "boolean"}
    elif isinstance(value, int):
        made = {"type": "integer", "minimum": 0}
    else:
        made = {"type": "string"}
    described = descriptions.get(".".join(path))
    return made | ({"description": described} if described else {})


def tier_schema(decode: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of one of ``tiers``: it has the values of ``decode`` and its own."""
    objective = {"type": ["number", "string"], "exclusiveMinimum": 0, "pattern": r"^\d+(\.\d+)?$"}
    own = {
        "pair": {"type": "string", "minLength": 1},
        "revision": {"type": "string"},
        "fallback": {"type": "string"},
        "ttftObjective": objective,
        "itlObjective": objective,
    }
    shared = {name: {"$ref": f"#/properties/decode/properties/{name}"} for name in decode["properties"]}
    return {"type": "object", "additionalProperties": False, "properties": own | shared}


def add_tiers_and_revisions(made: dict[str, Any]) -> None:
    """Complete the chart's schema where the defaults of ``tiers``, ``revision`` and ``canary`` do not determine it."""
    properties = made["properties"]
    made["definitions"] = {"tier": tier_schema(properties["decode"])}
    tier = {"$ref": "#/definitions/tier"}
    names = {"propertyNames": {"pattern": _NAME}, "maxProperties": MAX_TIERS}
    properties["tiers"] |= names | {"additionalProperties": {"allOf": [tier], "required": ["pair"]}}
    revision = {"pattern": f"^$|{_NAME}"}
    properties["revision"] |= revision
    canary = properties["canary"]["properties"]
    canary["revision"] |= revision
    canary["percent"] |= {"type": "number", "minimum": 0, "maximum": 100}
    canary["tiers"] |= names | {"additionalProperties": tier}
    for name in ("pair", "prefill", "decode"):
        canary[name] = {"allOf": [{"$ref": f"#/properties/{name}"}], "description": canary[name]["description"]}


def described(text: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted path and description of each described key of a values file, in order."""
    path: list[tuple[int, str]] = []
    comment = ""
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# --"):
            comment = stripped.removeprefix("# --").strip()
        elif stripped.startswith("#"):
            comment = f"{comment} {stripped.removeprefix('#').strip()}" if comment else ""
        elif match := re.match(r"( *)([\w.-]+):", line):
            path = [(indent, key) for indent, key in path if indent < len(match[1])]
            path.append((len(match[1]), match[2]))
            if comment:
                yield ".".join(key for _, key in path), comment
            comment = ""


def readme(values: dict[str, Any], descriptions: dict[str, str]) -> str:
    head = (HELM / "README.head.md").read_text().rstrip()
    lines = [head, "", "## Values", "", "| value | default | description |", "|---|---|---|"]
    for path, what in descriptions.items():
        default: Any = values
        for key in path.split("."):
            default = default[key]
        lines.append(f"| `{path}` | `{json.dumps(default)}` | {_cell(what)} |")
    lines += [
        "",
        "## Settings",
        "",
        "Keys of `router.settings`, `prefill.settings`, `decode.settings` and `colocated.settings`.",
    ]
    for kind in SERVICES:
        lines += ["", f"### {kind.section}", "", "| setting | description |", "|---|---|"]
        for key, property in settings_schema(kind)["properties"].items():
            lines.append(f"| `{key}` | {_cell(property['description'])} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def outputs() -> dict[Path, str]:
    """Return path -> contents of each generated file."""
    text = (CHART / "values.yaml").read_text()
    values, descriptions = yaml.safe_load(text), dict(described(text))
    made = {"$schema": "http://json-schema.org/draft-07/schema#", **schema(values, (), descriptions)}
    made["properties"]["global"] = {"type": "object"}  # Helm's own
    add_tiers_and_revisions(made)
    return {
        CHART / "values.schema.json": json.dumps(made, indent=1) + "\n",
        CHART / "README.md": readme(values, descriptions),
    }


def main(argv: list[str]) -> int:
    files = outputs()
    changed = sorted(path for path, text in files.items() if not path.exists() or path.read_text() != text)
    if argv == ["--check"]:
        for path in changed:
            print(f"{path.relative_to(ROOT)} is not up to date; run make chart")
        return 1 if changed else 0
    for path in changed:
        path.write_text(files[path])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
