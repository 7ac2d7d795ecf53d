"""``overfill bench memory``."""

from __future__ import annotations

from pathlib import Path

import click

from overfill.cli.output import console, print_json


@click.command("memory")
@click.option("--pair", default="fast", show_default=True, help="default, fast, identity, or the folder of a pair.")
@click.option("--requests", type=click.IntRange(10), default=10_000, show_default=True, help="How many to answer.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's own choice]")
@click.option("--allowed", type=click.IntRange(0), default=16, show_default=True, help="MiB of growth to put up with.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curve to this file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def memory_command(
    pair: str, requests: int, threads: int | None, allowed: int, plot: Path | None, as_json: bool
) -> int:
    """Answer many short requests in one process and watch its memory.

    Exit code 1 when it grew by more than --allowed after the first tenth of the requests.
    """
    from overfill.bench.memory import MIB, measure_memory
    from overfill.bench.plots import save_memory
    from overfill.pair.progress import progress_bars
    from overfill.pair.store import resolve_pair

    with progress_bars() as report:
        folder = resolve_pair(pair, report)
        run = measure_memory(folder, requests, threads, lambda done: report("Answering", done, requests))
    if plot is not None:
        save_memory(plot, f"{requests:,} short requests, pair {folder.name}", run.requests, run.resident, run.warm)
    warm, last = run.resident[run.warm], run.resident[-1]
    if as_json:
        print_json({"requests": requests, "warm_bytes": warm, "last_bytes": last, "growth_bytes": run.growth})
    else:
        console().print(
            f"{requests:,} requests: {warm / MIB:,.0f} MiB after the first tenth, {last / MIB:,.0f} MiB at the end; "
            f"grew by {run.growth / MIB:+,.1f} MiB"
        )
    return int(run.growth > allowed * MIB)
