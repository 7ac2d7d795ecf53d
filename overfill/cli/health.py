"""``overfill health``: asks a process for its gRPC health, for probes and scripts. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from overfill.cli.options import Number, address_option, client_tls, tls_options

if TYPE_CHECKING:
    from overfill.rpc.tls import ClientTls


@click.command("health")
@address_option("Address of a process of the stack, or of several, separated by commas: the first that answers counts.")
@click.option(
    "--service", default="", help="gRPC service to ask for, such as overfill.v1.Decode.  [default: the whole process]"
)
@click.option(
    "--timeout",
    type=Number(min=0.1),
    default=3.0,
    show_default=True,
    help="Seconds to wait for an answer, shared by all addresses.",
)
@click.option("--live", is_flag=True, help="Exit with 0 on any answer, ready or not. For liveness probes.")
@tls_options
def health_command(
    address: str,
    service: str,
    timeout: float,
    live: bool,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_name: str | None,
) -> int:
    """Ask one process of a stack whether it is ready. The call is that of the standard gRPC health service.

    A worker is ready when its model is loaded and a router has welcomed it. A router is ready while a prefill and a
    decode worker are ready. A draining process is not ready, but it is alive; so is one that refuses the call.

    \b
    Exit code:
      0  ready (with --live: any answer)
      1  not ready, or no answer
      2  wrong usage
    """
    from overfill.rpc.addresses import split_addresses

    tls = client_tls(tls_ca, tls_cert, tls_key, tls_name)
    try:
        addresses = split_addresses(address)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    for index, one in enumerate(addresses):
        last = index == len(addresses) - 1
        answered, good = _ask(one, service, timeout / len(addresses), live, tls, last)
        if answered:
            return 0 if good else 1
    return 1


def _ask(
    address: str, service: str, timeout: float, live: bool, tls: ClientTls | None, last: bool
) -> tuple[bool, bool]:
    """Returns whether the process answered, and whether the answer means exit code 0."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from overfill.rpc.channel import open_sync_channel
    from overfill.rpc.status import from_rpc_error
    from overfill.rpc.tls import TlsError

    try:
        channel = open_sync_channel(address, tls)
    except TlsError as error:
        raise click.UsageError(str(error)) from error
    with channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout, wait_for_ready=False).status
        except grpc.RpcError as error:
            dead = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            hint = (
                " (start a stack with `overfill up`, or give the address of one with --address)"
                if dead and last
                else ""
            )
            click.echo(f"overfill: {from_rpc_error(error, address)}{hint}", err=True)
            return not dead, live
    click.echo(health_pb2.HealthCheckResponse.ServingStatus.Name(status))
    return True, live or status == health_pb2.HealthCheckResponse.SERVING
