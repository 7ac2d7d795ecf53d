"""``overfill bench router``: CPU, latency and memory of the router, beside bare servers."""

from __future__ import annotations

import click

from overfill.cli.options import Number
from overfill.lab.measurement import print_measurements
from overfill.lab.commands.bench_options import json_option, pair_folder


@click.command("router", short_help="CPU, latency and memory of the router, beside bare servers.")
@click.option("--pair", default="mock", show_default=True, help="Pair whose tokenizer and KV geometry are used.")
@click.option(
    "--seconds", type=Number(0.5), default=2.0, show_default=True, help="Duration of each part of the measurement."
)
@click.option(
    "--apis", is_flag=True, help="Compare the APIs over HTTP with chat completions, and measure nothing else."
)
@json_option
def router_command(pair: str, seconds: float, apis: bool, as_json: bool) -> int:
    """Measure the router with mock workers: CPU per request and per token, saturation, added latency, memory.

    Requests come over HTTP and over gRPC, 1, 32 and 256 at a time. The peers in the same run are a bare uvicorn and a
    bare grpc.aio server, which send the same bytes. Exits with 1 when a bound is missed.
    """
    from overfill.lab.bench.router.apis import measure_apis
    from overfill.lab.bench.router.cost import measure_cost

    measure = measure_apis if apis else measure_cost
    return print_measurements(measure(pair_folder(pair), seconds), as_json)
