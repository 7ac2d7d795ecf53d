"""Every command of ``overfill``, with its arguments and options, from the commands themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click
from table_text import cell, table

from overfill.cli.main import GROUPS, cli

_LONG_DEFAULT = 25  # characters
_DEFAULT = re.compile(r"\s*\[default: (.*)\]$", re.DOTALL)


def overview() -> str:
    """Returns a table of the commands by purpose."""
    return table(
        ("to", "commands"),
        (
            (heading, ", ".join(f"[`{name}`](#{_anchor(f'overfill {name}')})" for name in names))
            for heading, names in GROUPS.items()
        ),
    )


def commands() -> str:
    """Returns a section for each command."""
    lines = []
    context = click.Context(cli, info_name="overfill")
    for heading, names in GROUPS.items():
        lines.append(f"## {heading}\n")
        for name in names:
            command = cli.get_command(context, name)
            assert command is not None
            lines += _command(command, f"overfill {name}", 3)
    return "\n".join(lines)


def _anchor(path: str) -> str:
    return path.replace(" ", "-")


def _command(command: click.Command, path: str, depth: int) -> Iterator[str]:
    title = path.rpartition(" ")[2]
    yield f"{'#' * depth} `{path}` {{ #{_anchor(path)} data-toc-label='{title}' }}\n"
    yield _help(command)
    context = click.Context(command, info_name=path)
    yield f"```text\n{path} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    options = [option for option in command.params if isinstance(option, click.Option) and not option.hidden]
    if options:
        yield table(("option", "value", "default", "meaning"), (_row(option) for option in options))
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from _command(each, f"{path} {name}", depth + 1)


def _help(command: click.Command) -> str:
    """Returns the command's help as Markdown. Blocks after ``\\b`` keep their lines."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    parts = []
    for paragraph in paragraphs:
        if paragraph.startswith("\b\n"):
            parts.append(f"```text\n{paragraph.removeprefix(chr(8) + chr(10))}\n```\n")
        else:
            parts.append(f"{cell(paragraph)}\n")
    return "\n".join(parts)


def _row(option: click.Option) -> tuple[str, str, str, str]:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    default, meaning = default_and_meaning(option)
    if option.multiple:
        meaning += " May be repeated."
    if option.envvar and option.show_envvar:
        meaning += f" Variable: `{option.envvar}`."
    return names, value_of(option), default, meaning


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
    if isinstance(kind, click.Choice):
        return ", ".join(f"`{choice}`" for choice in kind.choices)
    if isinstance(kind, click.IntRange | click.FloatRange):
        what = "integer" if isinstance(kind, click.IntRange) else "number"
        return f"{what}{_range(kind)}"
    if isinstance(kind, click.Path | click.File):
        return "folder" if isinstance(kind, click.Path) and not kind.file_okay else "file"
    names = {"integer": "integer", "float": "number", "text": "text", "boolean": "boolean"}
    return names.get(kind.name) or " or ".join(f"`{each}`" for each in kind.name.split("|"))


def _range(kind: click.IntRange | click.FloatRange) -> str:
    low = None if kind.min is None else f"{'above' if kind.min_open else 'at least'} {kind.min:g}"
    high = None if kind.max is None else f"{'below' if kind.max_open else 'at most'} {kind.max:g}"
    if low and high and not (kind.min_open or kind.max_open):
        return f", {kind.min:g} to {kind.max:g}"
    return "".join(f", {bound}" for bound in (low, high) if bound)
