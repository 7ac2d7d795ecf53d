"""``overfill bench router``: the router's CPU and latency, its behaviour under overload, its decision time."""

from __future__ import annotations

from pathlib import Path

import click

from overfill.cli.options import Number
from overfill.lab.bench.measurement import print_measurements
from overfill.lab.commands.bench_options import Counts, json_option, pair_folder


@click.command("router", short_help="CPU, latency, memory and overload of the router, beside bare servers.")
@click.option("--pair", default="mock", show_default=True, help="Pair whose tokenizer and KV geometry are used.")
@click.option(
    "--seconds", type=Number(0.5), default=2.0, show_default=True, help="Duration of each part of the measurement."
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
@click.option(
    "--profile",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write to this file which functions use the router's CPU time, instead of the normal measurement.",
)
@json_option
def router_command(
    pair: str,
    seconds: float,
    overload: float | None,
    decisions: tuple[int, ...] | None,
    profile: Path | None,
    as_json: bool,
) -> int:
    """Measure the router with mock workers: CPU per request and per token, saturation, added latency, memory.

    Requests come over HTTP and over gRPC, 1, 32 and 256 at a time. The peers in the same run are a bare uvicorn and a
    bare grpc.aio server, which send the same bytes. Exits with 1 when a bound is missed.
    """
    modes = {"--overload": overload, "--decisions": decisions, "--profile": profile}
    given = [name for name, value in modes.items() if value is not None]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} cannot be used together; give one of them")
    if decisions is not None:
        from overfill.lab.bench.router.decisions import measure_decisions

        return print_measurements(measure_decisions(decisions), as_json)
    folder = pair_folder(pair)
    if overload is not None:
        from overfill.lab.bench.router.overload import measure_overload

        return print_measurements(measure_overload(folder, overload), as_json)
    from overfill.lab.bench.router.cost import ANSWER, STREAMS, measure_cost

    if profile is not None:
        from overfill.lab.bench.router.profile import profile_router

        profile.write_text(profile_router(folder, 5 * seconds, STREAMS[-1], ANSWER))
        return 0
    return print_measurements(measure_cost(folder, seconds), as_json)
