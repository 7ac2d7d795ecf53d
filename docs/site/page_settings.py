"""The page of the settings: those of every service and of ``overfill up``, from their declarations."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import click
from annotated_types import Ge, Gt, Le
from page_cli import LONG_DEFAULT, value
from page_text import cell, sentence, table
from pydantic.fields import FieldInfo

from overfill.cli.up import up_command
from overfill.settings.common import CommonSettings
from overfill.settings.config import (
    SERVICES,
    UP_KEYS,
    ColocatedConfig,
    DecodeConfig,
    PrefillConfig,
    RouterConfig,
    ServiceConfig,
    WorkerConfig,
)
from overfill.settings.config_file import field_name, flag_name
from overfill.settings.mock import MockColocatedConfig
from overfill.settings.reader import SEPARATORS
from overfill.settings.renamed import REMOVED_IN, RENAMED

_INTRODUCTION = """# Settings

Every setting of the services and of `overfill up`: its option, environment variable, type, default and meaning.

## Where a value comes from

Each setting has three names. `kv-memory` of prefill workers is

* the option `--kv-memory` of `overfill-prefill`,
* the environment variable `OVERFILL_PREFILL_KV_MEMORY`,
* the key `kv-memory` in the file of `--config`, in the section `prefill`, or in the section `common` for all services
  that have this setting.

The key is always the option without its dashes. The sections are `router`, `prefill`, `decode`, `worker` (both stages),
`up` and `common`. The first of these that is set wins:

1. the option
2. the variable
3. the key in the service's own section
4. the key in `common`
5. the default

Further rules:

* Variables, sections and keys that do not exist are errors. The message suggests the nearest name.
* An empty value counts as not set.
* Relative paths are relative to the working directory of the process.
* The file is YAML (`.yaml`, `.yml`) or TOML (`.toml`). YAML values are read as text, like variables: `on` is not a
  boolean. In TOML, write `"on"` and `"off"` in quotes.
* Sizes are bytes, or have a unit: `512MiB`, `8GiB`.
* Services check all values at start, before they load a model.

`overfill config check FILE` checks a file. `overfill config show` prints the value of each setting and where it comes
from. `deploy/overfill.yaml` is an example of a file.

On Ray and in the Helm chart, settings have the names of the keys: `router.settings`, `prefill.settings` and
`decode.settings` of the chart's values.
"""

_UP = """## `overfill up`

These settings are of `overfill up` alone, or are shared with a service. Their variables begin with `OVERFILL_UP_`; their
keys belong in the section that the table names. Where a service has the same setting under another variable, `up`
reads both variables, and its own wins. A setting may be in one of its two sections, not in both.

`decoder` is a list in a file, or one text with semicolons, as in `OVERFILL_UP_DECODER`.
"""

_UP_OTHERS = """All other options of [`overfill up`](cli.md#overfill-up) are settings of services. `up` passes them to
every process that has the setting. Their variables and keys are those of the services: {others}. Options of `up` alone
without a variable: {alone}.
"""

_COMMANDS = """## Variables of commands

| variable | read by | meaning |
|---|---|---|
| `OVERFILL_ADDRESS` | commands that call a stack | default of `--address` |
| `OVERFILL_API_KEY` | commands that call a stack | default of `--api-key` |
| `OVERFILL_TLS_CA`, `OVERFILL_TLS_CERT`, `OVERFILL_TLS_KEY`, `OVERFILL_TLS_NAME` | commands that call a stack | defaults of `--tls-ca` and so on |
| `OVERFILL_HOME` | every process that reads a named pair | folder of cached models, pairs and benchmark engines; `~/.cache/overfill` by default |
| `OTEL_EXPORTER_OTLP_ENDPOINT` | services, the SDK | where traces go when `--otlp-traces-endpoint` is not set; the other variables `OTEL_*` of OpenTelemetry work too |
"""

_ALIASES = {
    "Port": "port",
    "PairName": "pair",
    "Bytes": "size",
    "EngineArgs": "JSON object",
    "Addresses": "addresses, separated by commas",
    "Names": "names, separated by commas",
    "Origins": "origins, separated by commas",
    "Tiers": "tiers, separated by semicolons",
    "TierOrder": "tiers, separated by `>`",
}
"""Types whose name in the code says more than what they consist of."""


def page() -> str:
    services = table(
        ("program", "runs", "section", "variables"),
        (
            (f"[`{kind.program}`](#{kind.program})", f"{(kind.__doc__ or '').partition('.')[0]}",
             f"`{kind.section}`", f"`{kind.variable('')}…`")
            for kind in SERVICES
        ),
    )  # fmt: skip
    common = set(CommonSettings.model_fields)
    of_workers = set(WorkerConfig.model_fields) - common
    parts = [
        _INTRODUCTION,
        services,
        "## All services\n",
        "In the variables, `*` stands for `ROUTER`, `PREFILL`, `DECODE` or `WORKER`.\n",
        _table(CommonSettings, common, SERVICES),
        "## All workers\n",
        "`overfill-prefill`, `overfill-decode` and `overfill-worker` have these settings too. In the variables, `*` stands "
        "for `PREFILL`, `DECODE` or `WORKER`.\n",
        _table(WorkerConfig, of_workers, (PrefillConfig, DecodeConfig, ColocatedConfig)),
    ]
    for kind, seen in (
        (RouterConfig, CommonSettings),
        (PrefillConfig, WorkerConfig),
        (DecodeConfig, WorkerConfig),
        (ColocatedConfig, DecodeConfig),
    ):
        parts += [f"## `{kind.program}` {{ #{kind.program} }}\n", (kind.__doc__ or "").partition(".")[0] + ".\n"]
        parts.append(_table(kind, {name for name in kind.model_fields if not _same(name, kind, seen)}, (kind,)))
        if kind is ColocatedConfig:
            parts.append("It also has the settings of [`overfill-decode`](#overfill-decode), with variables of its own.\n")
    parts += [_UP, _table_of_up(), _others_of_up(), _COMMANDS, _mock(), _renamed()]
    return "\n".join(parts)


def _same(name: str, kind: type[ServiceConfig], other: type[CommonSettings]) -> bool:
    """True if ``kind`` has inherited the setting from ``other`` without a change."""
    field, inherited = kind.model_fields[name], other.model_fields.get(name)
    return inherited is not None and (field.description, field.default) == (inherited.description, inherited.default)


def _table(declares: type[CommonSettings], names: set[str], kinds: tuple[type[ServiceConfig], ...]) -> str:
    return table(
        ("option, variable", "value", "default", "meaning"),
        (
            _row(name, declares.model_fields[name], declares, kinds)
            for name in declares.model_fields
            if name in names
        ),
    )


def _row(
    name: str, field: FieldInfo, declares: type[CommonSettings], kinds: tuple[type[ServiceConfig], ...]
) -> tuple[str, str, str, str]:
    of = [kind for kind in kinds if _same(name, kind, declares)]
    others = [kind for kind in kinds if kind not in of]
    variable = kinds[0].variable(name) if len(kinds) == 1 else f"OVERFILL_*_{name.upper()}"
    meaning = sentence(cell(field.description or "")) + "."
    if others:
        meaning += " Different on " + ", ".join(f"[`{kind.program}`](#{kind.program})" for kind in others) + "."
    target = kinds[0].program if len(kinds) == 1 else "all"
    anchor = f'<span id="{target}-{flag_name(name)}"></span>'
    return f"{anchor}`--{flag_name(name)}`<br>`{variable}`", _value(name, field, declares), _default(name, field), meaning


def _value(name: str, field: FieldInfo, declares: type[CommonSettings]) -> str:
    annotation = next(str(each.__annotations__[name]) for each in declares.__mro__ if name in each.__annotations__)
    parts = [part for part in annotation.split(" | ") if part != "None"]
    texts = [_ALIASES[part] for part in parts if part in _ALIASES]
    if choices := list(_choices(field.annotation)):
        texts += [f"`{choice}`" for choice in choices]
        return " or ".join(texts) if parts[0] in _ALIASES else ", ".join(texts)
    if texts:
        return texts[0]
    names = {"int": "integer", "float": "number", "Path": "path", "str": "text"}
    return names[parts[0]] + "".join(_bounds(field.metadata))


def _choices(annotation: Any) -> Iterator[str]:
    """Yields the texts of the annotation's Literals."""
    if get_origin(annotation) is Union or get_args(annotation):
        for each in get_args(annotation):
            if isinstance(each, str):
                yield each
            else:
                yield from _choices(each)


def _bounds(metadata: list[Any]) -> Iterator[str]:
    low = next((f"at least {each.ge:g}" for each in metadata if isinstance(each, Ge)), "")
    low = low or next((f"above {each.gt:g}" for each in metadata if isinstance(each, Gt)), "")
    high = next((f"at most {each.le:,g}" for each in metadata if isinstance(each, Le)), "")
    yield from (f", {bound}" for bound in (low, high) if bound)


def _default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None or field.default in ("", ()):
        return ""
    value = SEPARATORS.get(name, ",").join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _up() -> Mapping[str, click.Option]:
    """Returns the options of ``overfill up`` by name, with their variables."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("OVERFILL_")}
    try:
        up_command.make_context("up", [])  # adds the variables
    finally:
        os.environ.update(kept)
    return {each.opts[0].removeprefix("--"): each for each in up_command.params if isinstance(each, click.Option)}


def _table_of_up() -> str:
    of_services = {variable: (kind, name) for kind in SERVICES for variable, name in kind.variables().items()}
    rows = []
    for name, option in _up().items():
        if not option.envvar:
            continue
        variables = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar)
        keys = [f"`up.{name}`"] if name in UP_KEYS else []
        keys += [f"`{kind.section}.{flag_name(field)}`" for kind, field in (of_services[each] for each in variables[1:])]
        if name == "pair":
            keys = ["`common.pair`"]
        shown = "".join(f"<br>`{each}`" for each in variables)
        names = "/".join(f"`{each}`" for each in (*option.opts, *option.secondary_opts))
        text, _, default = (option.help or "").partition("[default: ")
        fallback = f"`{option.default}`" if isinstance(option.default, str | int) and not option.is_flag else ""
        default = cell(default.strip().removesuffix("]")) or fallback
        meaning = cell(text)
        if len(default) > LONG_DEFAULT:
            meaning, default = f"{meaning} Default: {default}.", ""
        rows.append((f'<span id="up-{name}"></span>{names}{shown}', "<br>".join(keys), value(option), default, meaning))
    return table(("option, variable", "key", "value", "default", "meaning"), rows)


def _others_of_up() -> str:
    known = {name: kind for kind in reversed(SERVICES) for name in kind.model_fields}
    others, alone = [], []
    for name, option in _up().items():
        if option.envvar or option.name == "help":
            continue
        kind = known.get(field_name(name))
        (others if kind else alone).append(f"`--{name}`")
    return _UP_OTHERS.format(others=", ".join(others), alone=", ".join(alone))


def _mock() -> str:
    names = [name for name in MockColocatedConfig.model_fields if name.startswith("mock_")]
    rows = []
    for name in names:
        field = MockColocatedConfig.model_fields[name]
        kind = "integer" if field.annotation in (int, int | None) else "number" if field.annotation is float else "text"
        rows.append((f"`--{flag_name(name)}`", kind + "".join(_bounds(field.metadata)),
                     _default(name, field), sentence(cell(field.description or "")) + "."))  # fmt: skip
    text = (
        "## Mock workers\n\n`overfill up --mock` and `python -m services.mock prefill|decode|worker` start workers that "
        "compute nothing. They have the settings of real workers and these. Their variables begin with "
        "`OVERFILL_MOCK_PREFILL_`, `OVERFILL_MOCK_DECODE_` and `OVERFILL_MOCK_WORKER_`. `--mock-base` and "
        "`--mock-per-token` are of workers that prefill, `--mock-step` and `--mock-per-sequence` of those that decode.\n"
    )
    return f"{text}\n{table(('option', 'value', 'default', 'meaning'), rows)}"


def _renamed() -> str:
    rows = ((f"`--{flag_name(old)}`", f"`--{flag_name(new)}`") for old, new in RENAMED.items())
    text = f"## Earlier names\n\nThese names work, with a warning, until version {REMOVED_IN}. So do their variables and keys."
    return f"{text}\n\n{table(('earlier', 'now'), rows)}"
