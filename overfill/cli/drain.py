"""``overfill drain``: takes a worker out of a running stack without losing a request."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from overfill.cli.options import ClientConnection, Number, connection_options

if TYPE_CHECKING:
    from overfill.client import StackStatus

_POLL = 0.5  # seconds between checks of the worker


@click.command("drain")
@click.argument("worker")
@click.option(
    "--timeout",
    type=Number(min=0),
    default=600.0,
    show_default=True,
    help="Seconds to wait until the worker has left; 0 does not wait.",
)
@connection_options
def drain_command(worker: str, timeout: float, connection: ClientConnection) -> int:
    """Take WORKER out of a running stack without losing a request. It refuses new requests and exits when it is idle.

    Requests that still run after the worker's --grace-period move to another worker. Exits with 1 if WORKER has not
    left after the timeout. `overfill status` lists the workers. If WORKER is the last one of a stage, the command says
    so and goes on.
    """
    from rich.console import Console

    from overfill.cli.output import counted
    from overfill.errors import PermissionDenied

    with connection.client() as client:
        with suppress(PermissionDenied):  # a key may drain and not see the status
            status = client.status()
            if pools := " and ".join(_last_of(status, worker)):
                which = "requests without a fallback" if status.several_tiers else "requests"
                click.echo(
                    f"overfill: {worker} is {pools}: {which} wait for another one to join, and fail with UNAVAILABLE "
                    "(HTTP 503) if none joins in time",
                    err=True,
                )
        client.drain(worker)
        deadline = time.monotonic() + timeout
        with Console(stderr=True, highlight=False).status(f"{worker} is draining") as line:
            while time.monotonic() < deadline:
                stages = [found for found in client.status().workers if found.id == worker]
                if not stages:
                    click.echo(f"{worker} has left")
                    return 0
                loads = [stage.process.load for stage in stages if stage.process is not None and stage.process.load]
                if loads:
                    requests = sum(load.running + load.waiting for load in loads)
                    line.update(f"{worker} is draining: {counted(requests, 'request')}")
                time.sleep(_POLL)
    if timeout == 0:
        click.echo(f"{worker} is draining")
        return 0
    raise click.ClickException(f"{worker} is still draining after {timeout:g} s; see `overfill status`")


def _last_of(status: StackStatus, worker: str) -> Iterator[str]:
    """Yields each pool, in words, of which ``worker`` is the only ready worker."""
    stages = [found for found in status.workers if found.id == worker]
    ready = (other for other in status.workers if other.id != worker and other.state == "ready")
    others = {(other.stage, other.tier, other.revision) for other in ready}
    for stage in stages:
        if (stage.stage, stage.tier, stage.revision) not in others:
            tier = f" of the tier {stage.tier}" if stage.tier and status.several_tiers else ""
            revision = f" of the revision {stage.revision}" if stage.revision else ""
            yield f"the last {stage.stage} worker{tier}{revision}"
