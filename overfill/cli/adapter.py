"""``overfill adapter``: loads, unloads and lists the adapters of a running stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from overfill.cli.options import ClientConnection, connection_options

if TYPE_CHECKING:
    from overfill.client import AdapterChange


@click.group("adapter")
def adapter_group() -> None:
    """Load, unload and list the adapters of a running stack.

    `overfill pair adapter add` puts adapters into the folder from which decode workers load them.
    """


@adapter_group.command("load")
@click.argument("name")
@connection_options
def load_command(name: str, connection: ClientConnection) -> int:
    """Have all decode workers load the adapter NAME from their folder of adapters.

    Exits with 1 if a worker has not loaded it.
    """
    with connection.client() as client:
        return _show(client.load_adapter(name), f"loaded {name}")


@adapter_group.command("unload")
@click.argument("name")
@connection_options
def unload_command(name: str, connection: ClientConnection) -> int:
    """Have all decode workers unload the adapter NAME. They finish its answers. Its folder stays.

    Exits with 1 if a worker has not unloaded it.
    """
    with connection.client() as client:
        return _show(client.unload_adapter(name), f"unloaded {name}")


@adapter_group.command("list")
@connection_options
def list_command(connection: ClientConnection) -> None:
    """List the adapters that requests may name, and the workers that have each."""
    from rich.table import Table

    from overfill.cli.output import console

    with connection.client() as client:
        workers = client.status().workers
    found: dict[tuple[str, str, str], list[str]] = {}
    for worker in workers:
        for name, digest in worker.adapters.items():
            found.setdefault((name, worker.tier or "", digest), []).append(worker.id)
    if not found:
        click.echo("no decode worker has an adapter")
        return
    table = Table(box=None, padding=(0, 1))
    for column in ("adapter", "tier", "digest", "workers"):
        table.add_column(column)
    for (name, tier, digest), ids in sorted(found.items()):
        table.add_row(name, tier, digest[:12], ", ".join(ids))
    console().print(table)


def _show(changes: Sequence[AdapterChange], done: str) -> int:
    """Prints what each worker has done. Returns the exit code."""
    for change in changes:
        click.echo(f"{change.worker_id}: {change.error or done}", err=change.error is not None)
    return int(any(change.error is not None for change in changes))
