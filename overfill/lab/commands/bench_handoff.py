"""``overfill bench handoff``: what a handoff costs a request, or the timeline of one handoff."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from overfill.cli.options import Number, dtype_option
from overfill.cli.output import console, print_json
from overfill.lab.bench.measurement import print_measurements
from overfill.lab.commands.bench_options import json_option, load_pair, log_line, pair_option

if TYPE_CHECKING:
    from overfill.kv.spec import DTypeName
    from overfill.lab.bench.handoff.timeline import Timeline

_TIMELINE_ONLY = ("streams", "bandwidth", "plot")
_COST_ONLY = ("rounds", "shm", "kv_codec")


@click.command("handoff", short_help="Cost of a handoff for a request; the timeline of one handoff.")
@pair_option
@click.option("--tokens", type=click.IntRange(2), help="Length of a prompt.  [default: 2048; 2000 with --timeline]")
@dtype_option
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of each worker.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Measured requests.")
@click.option("--shm/--no-shm", default=True, show_default=True, help="KV through shared memory.")
@click.option(
    "--kv-codec",
    type=click.Choice(["raw", "int8"]),
    default="raw",
    show_default=True,
    help="Encoding of KV between the workers.",
)
@click.option("--timeline", is_flag=True, help="Record the events of a single handoff, over gRPC, instead.")
@click.option(
    "--streams", type=click.IntRange(1), default=2, show_default=True, help="With --timeline: data connections."
)
@click.option(
    "--bandwidth",
    type=Number(min=0, min_open=True),
    help="With --timeline: limit of each data connection, MB/s.  [default: none]",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --timeline: draw it to this file (.png, .svg).",
)
@json_option
@click.pass_context
def handoff_command(
    ctx: click.Context,
    pair: str,
    tokens: int | None,
    dtype: DTypeName | None,
    threads: int,
    rounds: int,
    shm: bool,
    kv_codec: str,
    timeline: bool,
    streams: int,
    bandwidth: float | None,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Measure time to first token beside a plain prefill, and how long the second token waits for KV.

    Exits with 1 when a bound is missed.

    With --timeline: when each layer ran, when its KV left, when the first token arrived. Exits with 1 when no KV left
    before the last layer started or, with --bandwidth, when the first token arrived after the KV.
    """
    _refuse_unused(ctx, _COST_ONLY if timeline else _TIMELINE_ONLY, timeline)
    if timeline:
        return _timeline(pair, tokens or 2000, dtype, threads, streams, bandwidth, plot, as_json)
    from overfill.engine.device import cpu_settings
    from overfill.lab.bench.handoff.measure import measure_handoff

    with cpu_settings(threads):  # as a worker is
        measurements = measure_handoff(
            load_pair(pair),
            tokens or 2048,
            dtype=dtype,
            threads=threads,
            rounds=rounds,
            shm=shm,
            kv_codec=kv_codec,
            log=log_line,
        )
    return print_measurements(measurements, as_json)


def _refuse_unused(ctx: click.Context, names: tuple[str, ...], timeline: bool) -> None:
    """Raises UsageError when the user gave an option that the chosen measurement does not use."""
    given = [name for name in names if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"{flags} cannot be used {'with' if timeline else 'without'} --timeline")


def _timeline(
    pair: str,
    tokens: int,
    dtype: DTypeName | None,
    threads: int,
    streams: int,
    bandwidth: float | None,
    plot: Path | None,
    as_json: bool,
) -> int:
    from overfill.lab.bench.handoff.timeline import record_timeline

    if plot is not None:  # before the measurement, so that a missing matplotlib is reported at once
        from overfill.lab.bench.handoff.plot import save_timeline
    timeline = asyncio.run(
        record_timeline(
            load_pair(pair),
            tokens,
            dtype=dtype,
            threads=threads,
            streams=streams,
            rate=None if bandwidth is None else bandwidth * 1e6,
            log=log_line,
        )
    )
    if plot is not None:
        save_timeline(plot, timeline)
    if as_json:
        print_json(asdict(timeline) | {"overlaps": timeline.overlaps, "token_before_kv": timeline.token_before_kv})
    else:
        # A table's own title would be wrapped to the width of the columns.
        console().print(f"one prefill of {tokens} tokens, {timeline.kv_bytes / 1e6:.1f} MB of KV")
        console().print(_timeline_table(timeline))
    good = timeline.overlaps and (bandwidth is None or timeline.token_before_kv)
    return 0 if good else 1


def _timeline_table(timeline: Timeline) -> Table:
    table = Table()
    table.add_column("event")
    table.add_column("ms", justify="right")
    sent = {
        "first layer starts": timeline.layers[0][0],
        "first KV leaves": timeline.first_kv_sent,
        "last layer starts": timeline.layers[-1][0],
        "last layer ends": timeline.layers[-1][1],
        "first token leaves": timeline.first_token_sent,
        "last KV has left": timeline.last_kv_sent,
    }
    received = {
        "received: first KV": timeline.first_kv_received,
        "received: first token": timeline.first_token_received,
        "received: last KV": timeline.last_kv_received,
    }
    for event, seconds in sorted(sent.items(), key=lambda item: item[1]):
        table.add_row(event, f"{1e3 * seconds:.1f}")
    table.add_section()
    for event, seconds in received.items():
        table.add_row(event, f"{1e3 * seconds:.1f}")
    return table
