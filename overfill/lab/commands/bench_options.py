"""Options and helpers that several subcommands of ``overfill bench`` share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from overfill.model.manifest import Pair


class Listed(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """A comma-separated list, such as ``1,8,32``.

    Args:
        item: Type of the items.
        empty: Whether the list may be empty.
    """

    def __init__(self, name: str, item: click.ParamType, *, empty: bool = False) -> None:  # type: ignore[type-arg]
        self.name = name
        self._item = item
        self._empty = empty

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        parts = () if self._empty and not value else str(value).split(",")
        return tuple(self._item.convert(part.strip(), param, ctx) for part in parts)


COUNTS = Listed("numbers", click.IntRange(1))
json_option = click.option("--json", "as_json", is_flag=True, help="Print a JSON line per figure instead of a table.")
install_option = click.option(
    "--install", is_flag=True, help="First install missing peers and tools into OVERFILL_HOME/envs."
)


def peer_pythons(peers: Iterable[str], install: bool) -> dict[str, Path]:
    """Interpreter of each peer's environment. With ``install``, installs those that are missing.

    Raises:
        UsageError: A peer is not installed.
    """
    from overfill.cli.progress import show_progress
    from overfill.lab.peers import environment

    found = {}
    with show_progress() as report:
        for peer in peers:
            python = environment.install(peer, report) if install else environment.python_of(peer)
            if python is None:
                raise click.UsageError(f"{peer} is not installed; add --install to download it")
            found[peer] = python
    return found


def load_pair(name: str) -> Pair:
    """Loads the manifest of a pair; prepares a named pair on first use, with progress bars."""
    from overfill.cli.progress import show_progress
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair

    with show_progress() as report:
        return Pair.load(resolve_pair(name, report))


def log_line(process: str, line: str) -> None:
    """Prints a line of a child process's output on stderr."""
    click.echo(f"{process} | {line}", err=True)
