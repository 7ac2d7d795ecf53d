"""``overfill bench router``: what the router itself costs, and what it does when ten times too much is asked."""

from __future__ import annotations

import click

from overfill.cli.options import Number
from overfill.lab.bench.figure import print_figures


@click.command("router")
@click.option(
    "--pair", default="default", show_default=True, help="Whose tokenizer and geometry the mock workers have."
)
@click.option("--seconds", type=Number(0.5), default=10.0, show_default=True, help="Of each part of the measurement.")
@click.option("--overload", type=Number(1), help="Instead: ten times the workers' capacity for so many seconds.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON per figure on stdout.")
def router_command(pair: str, seconds: float, overload: float | None, as_json: bool) -> int:
    """Measure the router with mock workers: CPU per request and token, saturation, latency, overload.

    Exits 1 when a goal is missed.
    """
    from overfill.lab.bench.router import measure_cost, measure_overload
    from overfill.pair.store import resolve_pair
    from overfill.telemetry.progress import show_progress

    with show_progress() as report:
        folder = resolve_pair(pair, report)
    figures = measure_cost(folder, seconds) if overload is None else measure_overload(folder, overload)
    return print_figures(figures, as_json)
