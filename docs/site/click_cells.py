"""Cells of a click option for tables: its value, its default and its meaning."""

from __future__ import annotations

import re

import click
from pydantic.fields import FieldInfo
from table_text import cell

from overfill.cli.up_options import SettingParam
from overfill.settings.allowed import allowed

_LONG_DEFAULT = 25  # characters
_DEFAULT = re.compile(r"\s*\[default: (.*)\]$", re.DOTALL)


def default_and_meaning(option: click.Option) -> tuple[str, str]:
    """Returns the cells of an option's default and meaning. A long default follows the meaning, in the wider column."""
    text, found = option.help or "", _DEFAULT.search(option.help or "")
    meaning = cell(_DEFAULT.sub("", text))
    if found is None:
        return "required" if option.required else f"`{option.default}`" if _is_shown(option.default) else "", meaning
    default = cell(found[1])
    return (default, meaning) if len(default) <= _LONG_DEFAULT else ("", f"{meaning} Default: {default}.")


def _is_shown(default: object) -> bool:
    return isinstance(default, str | int | float) and not isinstance(default, bool) and default != ""


def value_of(option: click.Option) -> str:
    """Returns what may follow the option; empty for one that takes no value."""
    if option.is_flag:
        return ""
    kind = option.type
    if isinstance(kind, SettingParam):
        return value_of_setting(kind.field, kind.name)
    if isinstance(kind, click.Choice):
        return ", ".join(f"`{choice}`" for choice in kind.choices)
    if isinstance(kind, click.IntRange | click.FloatRange):
        what = "integer" if isinstance(kind, click.IntRange) else "number"
        return f"{what}{_range(kind)}"
    if isinstance(kind, click.Path | click.File):
        return "folder" if isinstance(kind, click.Path) and not kind.file_okay else "file"
    names = {"integer": "integer", "float": "number", "text": "text", "boolean": "boolean"}
    return names.get(kind.name) or _codes(kind.name)


def value_of_setting(field: FieldInfo, placeholder: str) -> str:
    """Returns what the value of a service's setting may be. A placeholder says more than that it is text."""
    words = allowed(field)
    return _codes(placeholder) if words == "text" and placeholder != "TEXT" else cell(words)


def _codes(texts: str) -> str:
    return " or ".join(f"`{each}`" for each in texts.split("|"))


def _range(kind: click.IntRange | click.FloatRange) -> str:
    low = None if kind.min is None else f"{'above' if kind.min_open else 'at least'} {kind.min:g}"
    high = None if kind.max is None else f"{'below' if kind.max_open else 'at most'} {kind.max:g}"
    if low and high and not (kind.min_open or kind.max_open):
        return f", {kind.min:g} to {kind.max:g}"
    return "".join(f", {bound}" for bound in (low, high) if bound)
