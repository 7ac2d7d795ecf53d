"""``overfill top``: watches a running stack in a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from overfill.cli.options import ClientConnection, Number, connection_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from overfill.client import Client, StackStatus

_ANSWER_SECONDS = 5.0


@click.command("top")
@click.option("--interval", type=Number(0.1), default=1.0, show_default=True, help="Seconds between updates.")
@click.option("--once", is_flag=True, help="Print once and exit. This is the default if stdout is not a terminal.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print a line of JSON per update until ctrl-C, or only one with --once."
)
@connection_options
def top_command(interval: float, once: bool, as_json: bool, connection: ClientConnection) -> int:
    """Watch a running stack: pools, queue, parts of the time to first token, sessions. Ctrl-C ends it.

    Percentiles cover the answers completed in the last minute, of all routers that share the --address. Routers with
    other addresses count their own.
    """
    from overfill.cli.output import console

    with connection.client() as client:
        if as_json:
            return _print_lines(client, None if once else interval)
        if once or not sys.stdout.isatty():
            console().print(_view(client.status(timeout=_ANSWER_SECONDS)))
            return 0
        return _watch(client, interval)


def _print_lines(client: Client, interval: float | None) -> int:
    import json

    from overfill.rpc.stack_status_json import stack_json

    while True:
        click.echo(json.dumps(stack_json(client.status(timeout=_ANSWER_SECONDS))))
        if interval is None:
            return 0
        time.sleep(interval)


def _watch(client: Client, interval: float) -> int:
    from rich.live import Live

    from overfill.cli.output import console
    from overfill.errors import OverfillError

    shown = _view(client.status(timeout=_ANSWER_SECONDS))
    with Live(shown, console=console(), screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval)
                try:
                    shown = _view(client.status(timeout=_ANSWER_SECONDS))
                except OverfillError as error:  # the stack may return
                    shown = str(error)
                live.update(shown, refresh=True)
        except KeyboardInterrupt:
            return 0


def _view(status: StackStatus) -> RenderableType:
    from overfill.cli.top_view import top_view

    return top_view(status)
