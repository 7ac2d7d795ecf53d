"""``overfill bench kv``: how fast KV moves, beside a raw gRPC stream in the same run."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from overfill.lab.bench.figure import print_figures

if TYPE_CHECKING:
    from overfill.kv.spec import DTypeName


@click.command("kv")
@click.option("--pair", default="default", show_default=True, help="Whose KV geometry: a named pair, or a folder.")
@click.option("--tokens", type=click.IntRange(16), default=8192, show_default=True, help="Tokens in one transfer.")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True,
    help="Element type of the KV cache.",
)  # fmt: skip
@click.option("--streams", type=click.IntRange(1), default=2, show_default=True, help="Data connections.")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True, help="Interleaved rounds.")
@click.option("--json", "as_json", is_flag=True, help="A JSON line per figure on stdout.")
def kv_command(pair: str, tokens: int, dtype: DTypeName, streams: int, rounds: int, as_json: bool) -> int:
    """Move KV between two processes: over gRPC, and through memory that both share.

    Beside it, in the same rounds, a raw gRPC stream of 1 MiB messages. Exit code 1 when a bound is not reached.
    """
    from overfill.engine.device import cpu_settings
    from overfill.lab.bench.kv import measure
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair
    from overfill.telemetry.progress import progress_bars

    with cpu_settings(threads=1):  # as a worker is
        with progress_bars() as report:
            folder = resolve_pair(pair, report)
        spec = Pair.load(folder).full_config.kv_spec(dtype)
        figures = asyncio.run(measure(spec, tokens, streams=streams, rounds=rounds))
    size = tokens * spec.token_bytes / 1e6
    click.echo(f"{size:.1f} MB of KV per transfer, {streams} streams, medians of {rounds} rounds", err=True)
    return print_figures(figures, as_json)
