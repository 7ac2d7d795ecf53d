"""``overfill bench router``: the router's CPU and latency, its behaviour under overload, its decision time."""

from __future__ import annotations

import click

from overfill.cli.options import Number
from overfill.lab.bench.measurement import print_measurements
from overfill.lab.commands.bench_options import Counts, geometry_option, json_option, pair_folder


@click.command("router", short_help="CPU, latency and overload of the router, beside a bare gRPC server.")
@geometry_option
@click.option(
    "--seconds", type=Number(0.5), default=10.0, show_default=True, help="Duration of each part of the measurement."
)
@click.option(
    "--overload",
    type=Number(1),
    help="Offer 10x the workers' capacity for N seconds, instead of the normal measurement.",
)
@click.option(
    "--decisions",
    type=Counts(),
    help="Time the dispatcher's decisions without sockets, with this many workers of each stage (10,100,1000), "
    "instead of the normal measurement.",
)
@json_option
def router_command(
    pair: str, seconds: float, overload: float | None, decisions: tuple[int, ...] | None, as_json: bool
) -> int:
    """Measure the router with mock workers: CPU per request and per token, saturation, added latency.

    The peer in the same run is a bare gRPC server that answers the same RPC at once. Exits with 1 when a bound is
    missed.
    """
    if overload is not None and decisions is not None:
        raise click.UsageError("--overload and --decisions cannot be used together; leave one out")
    if decisions is not None:
        from overfill.lab.bench.router.decisions import measure_decisions

        return print_measurements(measure_decisions(decisions), as_json)
    from overfill.lab.bench.router.measure import measure_cost, measure_overload

    folder = pair_folder(pair)
    measurements = measure_cost(folder, seconds) if overload is None else measure_overload(folder, overload)
    return print_measurements(measurements, as_json)
