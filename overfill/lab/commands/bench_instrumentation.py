"""``overfill bench instrumentation``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from overfill.cli.options import dtype_option
from overfill.lab.bench.figure import print_figures

if TYPE_CHECKING:
    from overfill.kv.spec import DTypeName


@click.command("instrumentation")
@click.option("--pair", default="default", show_default=True, help="default, fast, identity, or the folder of a pair.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Sequences at once.")
@click.option("--context", type=click.IntRange(1), default=256, show_default=True, help="Tokens of each prompt.")
@click.option("--rounds", type=click.IntRange(2), default=30, show_default=True, help="Turns with metrics and without.")
@click.option("--steps", type=click.IntRange(1), default=8, show_default=True, help="Decode steps in a turn.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's own choice]")
@dtype_option
@click.option("--json", "as_json", is_flag=True, help="A JSON line per figure on stdout.")
def instrumentation_command(
    pair: str,
    batch: int,
    context: int,
    rounds: int,
    steps: int,
    threads: int | None,
    dtype: DTypeName | None,
    as_json: bool,
) -> int:
    """Decode with metrics and without, in turns: what counting costs.

    Exit code 1 when it is more than 2 % of the throughput (the median over the rounds).
    """
    import torch

    from overfill.lab.bench.instrumentation import measure_instrumentation
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair
    from overfill.telemetry.progress import show_progress

    if threads is not None:
        torch.set_num_threads(threads)
    with show_progress() as report:
        figures = measure_instrumentation(
            Pair.load(resolve_pair(pair, report)),
            batch=batch,
            context=context,
            rounds=rounds,
            steps=steps,
            dtype=dtype,
            report=report,
        )
    click.echo(f"pair {pair}, batch {batch}, {rounds} rounds of {steps} steps; 95 % intervals", err=True)
    return print_figures(figures, as_json)
