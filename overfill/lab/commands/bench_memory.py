"""``overfill bench memory``."""

from __future__ import annotations

from pathlib import Path

import click

from overfill.lab.bench.figure import print_figures


@click.command("memory")
@click.option("--pair", default="fast", show_default=True, help="default, fast, identity, or the folder of a pair.")
@click.option("--requests", type=click.IntRange(640), default=10_000, show_default=True, help="How many to answer.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's own choice]")
@click.option("--allowed", type=click.IntRange(0), default=16, show_default=True, help="MiB of growth to put up with.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curve to this file.")
@click.option("--json", "as_json", is_flag=True, help="A JSON line per figure on stdout.")
def memory_command(
    pair: str, requests: int, threads: int | None, allowed: int, plot: Path | None, as_json: bool
) -> int:
    """Answer many short requests in one process and watch its memory.

    Exit code 1 when it grew by more than --allowed after the first tenth of the requests.
    """
    from overfill.lab.bench.figure import Figure
    from overfill.lab.bench.memory import MIB, measure_memory
    from overfill.lab.bench.plots import save_memory
    from overfill.pair.store import resolve_pair
    from overfill.telemetry.progress import show_progress

    with show_progress() as report:
        folder = resolve_pair(pair, report)
        run = measure_memory(folder, requests, threads, lambda done: report("Answering", done, requests))
    if plot is not None:
        save_memory(plot, f"{requests:,} short requests, pair {folder.name}", run.requests, run.resident, run.warm)
    warm, last = run.resident[run.warm] / MIB, run.resident[-1] / MIB
    figures = [
        Figure("memory_after_a_tenth", warm, "MiB"),
        Figure("memory_at_the_end", last, "MiB"),
        Figure("memory_growth", run.growth / MIB, "MiB", allowed),
    ]
    return print_figures(figures, as_json)
