"""Every setting of the services and of ``overfill up``, from their declarations."""

from __future__ import annotations

import json
from collections.abc import Callable

import click
from click_cells import value_of_setting
from pydantic import ByteSize
from pydantic.fields import FieldInfo
from table_text import cell, sentence, table

from overfill.cli.up import up_command
from overfill.engine.mock.options import MockOptions
from overfill.settings.allowed import default_text, placeholder
from overfill.settings.common import CommonSettings
from overfill.settings.config import (
    SERVICES,
    ColocatedConfig,
    DecodeConfig,
    PrefillConfig,
    RouterConfig,
    WorkerConfig,
)
from overfill.settings.config_file import field_name, flag_name
from overfill.settings.reader import SEPARATORS

Settings = type[CommonSettings]

_COLUMNS = ("option, variable", "value", "default", "meaning")


def _new_in(kind: Settings, *bases: Settings) -> list[str]:
    """Returns the settings that ``kind`` declares, or declares differently from all ``bases``."""
    inherited = [base.model_fields for base in bases]
    return [
        name
        for name, field in kind.model_fields.items()
        if not any(name in fields and _same(field, fields[name]) for fields in inherited)
    ]


def _same(field: FieldInfo, other: FieldInfo) -> bool:
    return (field.description, field.default) == (other.description, other.default)


def _shared(declares: Settings, names: list[str], services: tuple[Settings, ...]) -> str:
    """Returns the table of settings that several services have."""
    rows = []
    for name in names:
        field = declares.model_fields[name]
        different = [kind.program for kind in services if not _same(kind.model_fields[name], field)]
        note = f" Different on {', '.join(f'[`{program}`](#{program})' for program in different)}." if different else ""
        rows.append(_row(declares, name, f"OVERFILL_*_{name.upper()}", "all", note))
    return table(_COLUMNS, rows)


def _own(kind: Settings, *bases: Settings) -> str:
    """Returns the table of the settings that only one service has."""
    return table(_COLUMNS, (_row(kind, name, kind.variable(name), kind.program) for name in _new_in(kind, *bases)))


def _row(kind: Settings, name: str, variable: str, prefix: str, note: str = "") -> tuple[str, str, str, str]:
    field, flag = kind.model_fields[name], flag_name(name)
    names = f'<span id="{prefix}-{flag}"></span>`--{flag}`<br>`{variable}`'
    return (
        names,
        value_of_setting(field, placeholder(name, field)),
        _default(name, field),
        f"{sentence(cell(field.description or ''))}.{note}",
    )


def _default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None or field.default in ("", ()):
        return ""
    if isinstance(field.default, tuple):
        return f"`{SEPARATORS.get(name, ',').join(map(str, field.default))}`"
    if isinstance(field.default, ByteSize):
        return f"`{default_text(field)}`"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def _only_options_of_up() -> str:
    settings = {name for kind in SERVICES for name in kind.model_fields}
    options = [each for each in up_command.params if isinstance(each, click.Option) and not each.hidden]
    names = [each.opts[0] for each in options if not each.envvar and field_name(each.opts[0][2:]) not in settings]
    return ", ".join(f"`{name}`" for name in names) + ".\n"


def _mock() -> str:
    rows = []
    for name, field in MockOptions.model_fields.items():
        rows.append(
            (f"`{name}`", f"`{json.dumps(field.get_default())}`", f"{sentence(cell(field.description or ''))}.")
        )
    return table(("argument", "default", "meaning"), rows)


_COMMON = list(CommonSettings.model_fields)
_OF_WORKERS = _new_in(WorkerConfig, CommonSettings)
TABLES: dict[str, Callable[[], str]] = {
    "all": lambda: _shared(CommonSettings, _COMMON, SERVICES),
    "workers": lambda: _shared(WorkerConfig, _OF_WORKERS, (PrefillConfig, DecodeConfig, ColocatedConfig)),
    "router": lambda: _own(RouterConfig, CommonSettings),
    "prefill": lambda: _own(PrefillConfig, WorkerConfig),
    "decode": lambda: _own(DecodeConfig, WorkerConfig),
    "colocated": lambda: _own(ColocatedConfig, DecodeConfig),
    "up-only-options": _only_options_of_up,
    "mock": _mock,
}
"""Name of a table -> function that returns its Markdown."""
