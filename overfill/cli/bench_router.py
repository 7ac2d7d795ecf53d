"""``overfill bench router``: what the router itself costs, and what it does when ten times too much is asked."""

from __future__ import annotations

import json
from dataclasses import asdict

import click


@click.command("router")
@click.option(
    "--pair", default="default", show_default=True, help="Whose tokenizer and geometry the mock workers have."
)
@click.option(
    "--seconds", type=click.FloatRange(0.5), default=10.0, show_default=True, help="Of each part of the measurement."
)
@click.option(
    "--overload", type=click.FloatRange(1), help="Instead: ten times the workers' capacity for so many seconds."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document per line on stdout.")
def router_command(pair: str, seconds: float, overload: float | None, as_json: bool) -> None:
    """Measure the router with mock workers: CPU per request and token, saturation, latency, overload."""
    from overfill.bench.router import measure_cost, measure_overload
    from overfill.pair.progress import progress_bars
    from overfill.pair.store import resolve_pair

    with progress_bars() as report:
        folder = resolve_pair(pair, report)
    found = asdict(measure_cost(folder, seconds)) if overload is None else asdict(measure_overload(folder, overload))
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name}: {value:,.1f}" if isinstance(value, float) else f"{name}: {value:,}")
