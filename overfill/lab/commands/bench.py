"""``overfill bench``: measurements, each printed as a table or as JSON."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from overfill.cli.options import Number, dtype_option
from overfill.cli.output import console, print_json
from overfill.lab.commands.bench_burst import burst_command
from overfill.lab.commands.bench_engine import decode_command, peers_group, prefill_command
from overfill.lab.commands.bench_handoff import chat_command, handoff_command
from overfill.lab.commands.bench_http import http_command
from overfill.lab.commands.bench_instrumentation import instrumentation_command
from overfill.lab.commands.bench_kv import kv_command
from overfill.lab.commands.bench_memory import memory_command
from overfill.lab.commands.bench_route import route_command
from overfill.lab.commands.bench_router import router_command
from overfill.lab.commands.bench_serve import serve_command

if TYPE_CHECKING:
    from overfill.kv.spec import DTypeName


@click.group("bench")
def bench_group() -> None:
    """Measure what a pair does on this machine."""


for command in (
    decode_command,
    prefill_command,
    serve_command,
    burst_command,
    http_command,
    route_command,
    router_command,
    chat_command,
    handoff_command,
    kv_command,
    instrumentation_command,
    memory_command,
    peers_group,
):
    bench_group.add_command(command)


@bench_group.command("timeline")
@click.option("--pair", default="default", show_default=True, help="default, fast, identity, or the folder of a pair.")
@click.option("--tokens", type=click.IntRange(1), default=2000, show_default=True, help="Length of the prompt.")
@dtype_option
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of the worker.")
@click.option("--streams", type=click.IntRange(1), default=2, show_default=True, help="Data connections.")
@click.option("--limit", "limit", type=Number(min=0, min_open=True), help="MB/s of each data connection.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the timeline to this file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def timeline_command(
    pair: str,
    tokens: int,
    dtype: DTypeName | None,
    threads: int,
    streams: int,
    limit: float | None,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Watch one handoff: when layers run, when their KV leaves, when the first token arrives.

    Exit code 1 when KV waited for the last layer or, with --limit, when the first token waited for the KV.
    """
    from overfill.lab.bench.timeline import record_timeline, save_plot
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair
    from overfill.telemetry.progress import show_progress

    with show_progress() as report:
        folder = resolve_pair(pair, report)

    def log(name: str, line: str) -> None:
        click.echo(f"{name} | {line}", err=True)

    timeline = asyncio.run(
        record_timeline(
            Pair.load(folder),
            tokens,
            dtype=dtype,
            threads=threads,
            streams=streams,
            rate=None if limit is None else limit * 1e6,
            log=log,
        )
    )
    if plot is not None:
        save_plot(timeline, plot)
    good = timeline.overlaps and (limit is None or timeline.token_before_kv)
    if as_json:
        print_json(asdict(timeline) | {"overlaps": timeline.overlaps, "token_before_kv": timeline.token_before_kv})
        return 0 if good else 1
    table = Table()
    table.add_column("event")
    table.add_column("ms", justify="right")
    rows = [
        ("first layer starts", timeline.layers[0][0]),
        ("first KV leaves", timeline.first_kv_sent),
        ("last layer starts", timeline.layers[-1][0]),
        ("last layer ends", timeline.layers[-1][1]),
        ("first token leaves", timeline.first_token_sent),
        ("last KV has left", timeline.last_kv_sent),
    ]
    for name, seconds in sorted(rows, key=lambda row: row[1]):
        table.add_row(name, f"{1e3 * seconds:.1f}")
    table.add_section()
    for name, seconds in (
        ("received: first KV", timeline.first_kv_received),
        ("received: first token", timeline.first_token_received),
        ("received: last KV", timeline.last_kv_received),
    ):
        table.add_row(name, f"{1e3 * seconds:.1f}")
    # Not the table's title, which is wrapped to the width of the columns.
    console().print(f"one prefill of {tokens} tokens, {timeline.kv_bytes / 1e6:.1f} MB of KV")
    console().print(table)
    return 0 if good else 1
