"""``overfill bench kv``: how fast KV moves, beside a raw gRPC stream in the same run."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from overfill.lab.bench.measurement import print_measurements
from overfill.lab.commands.bench_options import geometry_option, json_option, load_pair

if TYPE_CHECKING:
    from overfill.kv.spec import DTypeName


@click.command("kv", short_help="Rate of KV between two processes, beside a raw gRPC stream.")
@geometry_option
@click.option("--tokens", type=click.IntRange(16), default=8192, show_default=True, help="Tokens in one transfer.")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True,
    help="Element type of the KV cache.",
)  # fmt: skip
@click.option("--streams", type=click.IntRange(1), default=2, show_default=True, help="Data connections.")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True, help="Interleaved rounds.")
@json_option
def kv_command(pair: str, tokens: int, dtype: DTypeName, streams: int, rounds: int, as_json: bool) -> int:
    """Measure how fast KV moves between two processes, over gRPC and through shared memory.

    The peer in the same rounds is a raw gRPC stream of 1 MiB messages. Exits with 1 when a bound is missed.
    """
    from overfill.engine.device import cpu_settings
    from overfill.lab.bench.kv.measure import measure

    with cpu_settings(threads=1):  # as a worker is
        spec = load_pair(pair).full_config.kv_spec(dtype)
        measurements = asyncio.run(measure(spec, tokens, streams=streams, rounds=rounds))
    size = tokens * spec.token_bytes / 1e6
    click.echo(f"{size:.1f} MB of KV per transfer, {streams} streams, medians of {rounds} rounds", err=True)
    return print_measurements(measurements, as_json)
