"""The page of the commands: every command of ``overfill``, with its arguments and options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click
from page_text import cell, table

from overfill.cli.main import GROUPS, cli

_INTRODUCTION = """# Command line

Every command of `overfill`, with its arguments, options and exit codes. `overfill COMMAND --help` prints the same.

The commands that start one process of a stack, `overfill-router`, `overfill-prefill`, `overfill-decode` and
`overfill-worker`, take [settings](settings.md) as options.

Commands exit with 0 on success, 1 on failure, 2 on wrong usage, and 130 when ctrl-C interrupts them. A command that
uses an exit code in another way says so. [Errors](errors.md#exit-codes) has the details.

`-h` and `--help` of every command print its help. `overfill --version` prints the version.
"""

LONG_DEFAULT = 25
"""Length in characters from which a default follows the meaning, in the wider column."""
_DEFAULT = re.compile(r"\s*\[default: (.*)\]$", re.DOTALL)


def page() -> str:
    lines = [_INTRODUCTION, *_overview()]
    context = click.Context(cli, info_name="overfill")
    for heading, commands in GROUPS.items():
        lines.append(f"## {heading}\n")
        for name in commands:
            command = cli.get_command(context, name)
            assert command is not None
            lines += _command(command, f"overfill {name}", 3)
    return "\n".join(lines)


def anchor(path: str) -> str:
    """Returns the anchor of a command, such as ``overfill-pair-build``."""
    return path.replace(" ", "-")


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yields every command with its path, such as ``overfill pair build``; groups come before their commands."""
    context = click.Context(cli, info_name="overfill")
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        yield f"overfill {name}", command
        if isinstance(command, click.Group):
            yield from ((f"overfill {name} {each}", command.commands[each]) for each in command.commands)


def _overview() -> Iterator[str]:
    rows = [
        (heading, ", ".join(f"[`{name}`](#{anchor(f'overfill {name}')})" for name in commands))
        for heading, commands in GROUPS.items()
    ]
    yield table(("to", "commands"), rows)


def _command(command: click.Command, path: str, depth: int) -> Iterator[str]:
    title = path.rpartition(" ")[2]
    yield f"{'#' * depth} `{path}` {{ #{anchor(path)} data-toc-label='{title}' }}\n"
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
    names = ", ".join(f"`{name}`" for name in option.opts)
    if option.secondary_opts:
        names += ", " + ", ".join(f"`{name}`" for name in option.secondary_opts)
    text = option.help or ""
    default = ""
    if found := _DEFAULT.search(text):
        text, default = _DEFAULT.sub("", text), cell(found[1])
    elif option.required:
        default = "required"
    elif option.show_default or not (option.is_flag or option.default is None):
        default = f"`{option.default}`" if _is_shown(option.default) else ""
    meaning = cell(text)
    if len(default) > LONG_DEFAULT:
        meaning, default = f"{meaning} Default: {default}.", ""
    if option.multiple:
        meaning += " May be repeated."
    if option.envvar and option.show_envvar:
        meaning += f" Variable: `{option.envvar}`."
    return names, value(option), default, meaning


def _is_shown(default: object) -> bool:
    return isinstance(default, str | int | float) and not isinstance(default, bool) and default != ""


def value(option: click.Option) -> str:
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
    return names.get(kind.name) or f"`{kind.name.replace('|', '&#124;')}`"


def _range(kind: click.IntRange | click.FloatRange) -> str:
    low = None if kind.min is None else f"{'above' if kind.min_open else 'at least'} {kind.min:g}"
    high = None if kind.max is None else f"{'below' if kind.max_open else 'at most'} {kind.max:g}"
    if low and high and not (kind.min_open or kind.max_open):
        return f", {kind.min:g} to {kind.max:g}"
    return "".join(f", {bound}" for bound in (low, high) if bound)
