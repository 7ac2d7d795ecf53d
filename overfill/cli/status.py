"""``overfill status``: shows the workers of a running stack."""

from __future__ import annotations

import click

from overfill.cli.options import ClientConnection, connection_options

_ANSWER_SECONDS = 5.0


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--wide",
    is_flag=True,
    help="Also show the workers' addresses, process ids, metrics addresses and start-up times.",
)
@connection_options
def status_command(as_json: bool, wide: bool, connection: ClientConnection) -> int:
    """Show the workers of a running stack.

    The stack is complete while each stage has at least as many ready workers as it was started with.

    \b
    Exit code:
      0  the stack can answer requests: at least one prefill and one decode worker are ready
      1  the stack cannot answer requests, or nothing answers at the address
      2  wrong usage
    """
    from overfill.cli.output import console, print_json, stack_state, status_json, status_tables

    with connection.client() as client:
        status = client.status(timeout=_ANSWER_SECONDS)
    tls = connection.tls is not None
    if as_json:
        print_json(status_json(status, tls))
    else:
        console().print(status_tables(status, tls, wide))
    if not status.serving:
        click.echo(f"overfill: {stack_state(status)}", err=True)
    return 0 if status.serving else 1
