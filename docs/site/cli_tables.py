"""Every command of ``overfill``, with its arguments and options, from the commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click
from click_cells import default_and_meaning, value_of
from table_text import cell, table

from overfill.cli.main import GROUPS, cli


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
    yield f"{'#' * depth} `{path}`\n"
    yield _help(command)
    context = click.Context(command, info_name=path)
    yield f"```text\n{path} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    options = [option for option in command.params if isinstance(option, click.Option) and not option.hidden]
    if options:
        yield table(("option", "value", "default", "meaning"), map(_row, options))
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
    if option.multiple and "repeat" not in meaning.lower():
        meaning += " May be repeated."
    if option.envvar and option.show_envvar:
        meaning += f" Variable: `{option.envvar}`."
    return names, value_of(option), default, meaning
