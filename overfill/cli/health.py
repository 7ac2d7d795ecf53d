"""``overfill health``: one process's gRPC health, for probes and scripts. Nothing of the stack is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from overfill.cli.options import Number, client_tls, tls_options

if TYPE_CHECKING:
    from overfill.rpc.tls import ClientTls


@click.command("health")
@click.argument("address", default="127.0.0.1:7600", envvar="OVERFILL_ADDRESS")
@click.option("--service", default="", help="A service of the process, such as overfill.v1.Decode.  [default: all]")
@click.option("--timeout", type=Number(min=0.1), default=3.0, show_default=True, help="Seconds.")
@click.option("--live", is_flag=True, help="Exit 0 on any answer: whether the process lives, for liveness probes.")
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
    """Ask the router or worker at ADDRESS whether it is ready (the standard gRPC health service).

    Without ADDRESS it asks that of OVERFILL_ADDRESS, or 127.0.0.1:7600. Of several addresses, separated by commas, it
    asks the first that answers. Prints the answer. Exits 0 when it is ready, 1 when it is not or does not answer. A
    worker is ready when its model is loaded; a router is ready while a prefill and a decode worker are. A draining
    process is not ready but lives; so does one that refuses.
    """
    from overfill.client.requests import split_addresses

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
    """Whether the process answered, and whether the answer is good."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from overfill.rpc.channel import open_sync_channel
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
            hint = " (start a stack with `overfill up`, or say which ADDRESS to ask)" if dead and last else ""
            click.echo(f"overfill: {address}: {error.code().name}: {error.details()}{hint}", err=True)
            return not dead, live
    click.echo(health_pb2.HealthCheckResponse.ServingStatus.Name(status))
    return True, live or status == health_pb2.HealthCheckResponse.SERVING
