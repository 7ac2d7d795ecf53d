"""``overfill bench handoff``: what a handoff costs a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from overfill.cli.options import dtype_option
from overfill.lab.bench.measurement import print_measurements
from overfill.lab.commands.bench_options import json_option, load_pair, log_line, pair_option

if TYPE_CHECKING:
    from overfill.kv.spec import DTypeName


@click.command("handoff", short_help="Cost of a handoff for a request, beside a plain prefill.")
@pair_option
@click.option("--tokens", type=click.IntRange(2), default=2048, show_default=True, help="Length of a prompt.")
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
@json_option
def handoff_command(
    pair: str,
    tokens: int,
    dtype: DTypeName | None,
    threads: int,
    rounds: int,
    shm: bool,
    kv_codec: str,
    as_json: bool,
) -> int:
    """Measure time to first token beside a plain prefill, and how long the second token waits for KV.

    Exits with 1 when a bound is missed.
    """
    from overfill.engine.device import cpu_settings
    from overfill.lab.bench.handoff import measure_handoff

    with cpu_settings(threads):  # as a worker is
        measurements = measure_handoff(
            load_pair(pair),
            tokens,
            dtype=dtype,
            threads=threads,
            rounds=rounds,
            shm=shm,
            kv_codec=kv_codec,
            log=log_line,
        )
    return print_measurements(measurements, as_json)
