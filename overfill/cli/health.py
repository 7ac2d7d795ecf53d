"""``overfill health``: one process's gRPC health, for probes and scripts. Nothing of the stack is loaded."""

from __future__ import annotations

from pathlib import Path

import click

from overfill.cli.options import Number, client_tls, tls_options


@click.command("health")
@click.argument("address", default="127.0.0.1:7600", envvar="OVERFILL_ADDRESS")
@click.option("--service", default="", help="A service of the process, such as overfill.v1.Decode.  [default: all]")
@click.option("--timeout", type=Number(min=0.1), default=3.0, show_default=True, help="Seconds.")
@click.option("--live", is_flag=True, help="Any answer will do: whether the process lives, not whether it is ready.")
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

    Without ADDRESS it asks the first of OVERFILL_ADDRESS, or 127.0.0.1:7600. Prints the answer. Exits 0 when it is
    ready, 1 when it is not or does not answer. A draining process is not ready but lives; so does one that refuses.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from overfill.rpc.channel import open_sync_channel
    from overfill.rpc.tls import TlsError

    address = address.partition(",")[0]
    tls = client_tls(tls_ca, tls_cert, tls_key, tls_name)
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
            hint = " (start a stack with `overfill up`, or say which ADDRESS to ask)" if dead else ""
            click.echo(f"overfill: {address}: {error.code().name}: {error.details()}{hint}", err=True)
            return 0 if live and not dead else 1
    click.echo(health_pb2.HealthCheckResponse.ServingStatus.Name(status))
    return 0 if live or status == health_pb2.HealthCheckResponse.SERVING else 1
